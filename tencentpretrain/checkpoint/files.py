"""Files of tensors: opened lazily whatever their form, written whole or not at all.

No file is executed: pickles are read by torch's weights-only reader, everything else has no code in it.
"""

from __future__ import annotations

import errno
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tencentpretrain.checkpoint import merging
from tencentpretrain.checkpoint.encoding import DTYPES, TIED_KEY, Format, put_tensors, stored_size
from tencentpretrain.data.durable import durable_file, free_bytes
from tencentpretrain.errors import CheckpointMismatch, ResourceError
from tencentpretrain.sniff import describe_file

_WRAPPERS = ("module", "model", "state_dict", "model_state_dict")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "mp_rank_00_model_states.pt")


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class TensorFile(Mapping[str, Tensor]):
    """Tensors by name. A tensor is read from disk when it is asked for, and not kept.

    Fields:
        path: the file or directory.
        metadata: what else the file says about itself.
    """

    path: Path
    entries: Mapping[str, _Entry] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading its values."""
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Returns a tensor's number format without reading its values."""
        return self.entries[name].dtype


def read_tensors(path: str | Path) -> TensorFile:
    """Opens weights: a safetensors or torch file, a sharded directory or its index, or a checkpoint directory.

    Wrappers around the mapping (`module`, `model`, `state_dict`) and the prefix `module.` are taken off.

    Raises:
        CheckpointMismatch: the path does not exist, is no such file, is damaged, or asks for code to be run.
    """
    path = Path(path)
    try:
        if path.is_dir():
            opened = _open_directory(path)
        elif path.is_file():
            opened = _open_file(path)
        else:
            raise CheckpointMismatch(f"{path}: there is no such file or directory of weights")
    except OSError as error:
        raise CheckpointMismatch(f"{path}: cannot be read ({error.strerror or error})") from error
    return _without_prefix(opened)


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], format: Format = "bin", metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors under their names; the file appears complete or not at all.

    Tensors that are one and the same stay so: a `.bin` holds both names, a safetensors file holds the first name and
    notes the others in its metadata, from where `read_tensors` restores them.

    Raises:
        ResourceError: the disk is full or the directory cannot be written.
    """
    path = Path(path)
    needed = stored_size(tensors, format, metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable_file(path) as file:
            put_tensors(file, tensors, format, metadata)
    except (OSError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = (
            f"the disk is full: about {needed:,} bytes are needed, {free_bytes(path):,} are free" if full else error
        )
        raise ResourceError(f"{path}: cannot be written ({reason}); what was there before is unchanged") from error


def _without_prefix(opened: TensorFile) -> TensorFile:
    entries: dict[str, _Entry] = {}
    for name, entry in opened.entries.items():
        bare = name
        while bare.startswith("module."):
            bare = bare.removeprefix("module.")
        if bare in entries:
            raise CheckpointMismatch(f"{opened.path}: holds {bare!r} twice, with and without the prefix 'module.'")
        entries[bare] = entry
    return TensorFile(path=opened.path, entries=entries, metadata=opened.metadata)


def _open_file(path: Path) -> TensorFile:
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":
        return _open_safetensors(path)
    if head.startswith(b"PK\x03\x04"):
        return _open_torch_archive(path)
    if head[:1] == b"\x80":
        return _open_pickle(path, mmap=False)
    if path.name.endswith(".index.json"):
        return _open_index(path)
    raise CheckpointMismatch(f"{path}: this is {_describe(path)}, not a file of weights (safetensors or torch .bin)")


def _describe(path: Path) -> str:
    described = describe_file(path)
    if described:
        return described
    with path.open("rb") as file:
        text = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    return "a JSON file" if text[:1] in (b"{", b"[") else "a text file"


def _open_safetensors(path: Path) -> TensorFile:
    try:
        handle: Any = safe_open(str(path), framework="pt")
        metadata = dict(handle.metadata() or {})
        entries = {name: _safetensors_entry(handle, name, path) for name in handle.keys()}  # noqa: SIM118
        tied = json.loads(metadata.pop(TIED_KEY, "{}"))
        for alias, name in tied.items():
            entries.setdefault(alias, entries[name])
    except (SafetensorError, KeyError, AttributeError, ValueError, TypeError, OverflowError, MemoryError,
            RecursionError) as error:  # fmt: skip
        raise CheckpointMismatch(f"{path}: {_safetensors_damage(path)} ({error})") from error
    return TensorFile(path=path, entries=entries, metadata=metadata)


def _safetensors_entry(handle: Any, name: str, path: Path) -> _Entry:
    part = handle.get_slice(name)
    code = part.get_dtype()
    if code not in DTYPES:
        raise CheckpointMismatch(f"{path}: {name} has the number format {code}, which is not supported")

    def load() -> Tensor:
        try:
            tensor: Tensor = handle.get_tensor(name)
            return tensor
        except SafetensorError as error:
            raise CheckpointMismatch(f"{path}: {name} cannot be read ({error})") from error

    return _Entry(tuple(part.get_shape()), DTYPES[code], load)


def _safetensors_damage(path: Path) -> str:
    """Says how long a damaged safetensors file should be, where its header still tells."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            return f"damaged safetensors file: its header needs {8 + length} bytes, but the file has {size}"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return "damaged safetensors file: its header is not readable"
    if expected != size:
        return f"truncated or overlong safetensors file: expected {expected} bytes, found {size}"
    return "damaged safetensors file"


def _open_torch_archive(path: Path) -> TensorFile:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        size = path.stat().st_size
        raise CheckpointMismatch(
            f"{path}: truncated or damaged torch file of {size} bytes ({error}); fetch or copy it again"
        ) from error
    if not any(member.filename.endswith("/data.pkl") for member in members):
        raise CheckpointMismatch(f"{path}: this is a zip archive, not a file of weights; unpack it first")
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise CheckpointMismatch(f"{path}: refused: this is a TorchScript program, not a mapping of names to tensors")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointMismatch(f"{path}: a torch file with compressed members, which torch does not write; refused")
    return _open_pickle(path, mmap=True)


def _open_pickle(path: Path, *, mmap: bool) -> TensorFile:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointMismatch(f"{path}: {_refusal(str(error))}") from error
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error,
            UnicodeDecodeError, AssertionError, MemoryError, OverflowError, ImportError) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointMismatch(f"{path}: truncated or damaged torch file ({reason})") from error
    found = _unwrap(content, path)
    return TensorFile(path=path, entries={name: _torch_entry(name, tensor, path) for name, tensor in found.items()})


def _refusal(message: str) -> str:
    wanted = re.search(r"(?:GLOBAL|global) `?([A-Za-z_][\w.]*)", message.partition("nsupported")[2])
    if wanted:
        return (
            f"refused, because this pickle asks to run {wanted[1]}; only files of plain tensors are opened. "
            "Save it again as a mapping of names to tensors, or as safetensors, where you trust it"
        )
    return "refused: not a torch file of plain tensors, or a damaged one"


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Finds the mapping of names to tensors, below the wrappers that frameworks add."""
    for _ in range(3):
        if not isinstance(content, Mapping):
            break
        nested = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if nested is None:
            break
        content = nested
    if isinstance(content, Mapping):
        found = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
        if found and not others:
            return found
        if others:
            raise CheckpointMismatch(
                f"{path}: not a mapping of names to tensors; it also holds {', '.join(others[:5])}"
            )
    kind = "an empty mapping" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise CheckpointMismatch(f"{path}: holds {kind}, not a mapping of names to tensors")


def _torch_entry(name: str, tensor: Tensor, path: Path) -> _Entry:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointMismatch(f"{path}: {name} is a sparse, quantized or empty-shell tensor, which is not supported")
    plain = tensor.detach()
    return _Entry(tuple(plain.shape), plain.dtype, lambda: plain)


def _open_directory(path: Path) -> TensorFile:
    indexes = sorted(path.glob("*.index.json"))
    ours = path / "tencentpretrain_model.bin.index.json"
    if ours in indexes or len(indexes) == 1:
        return _open_index(ours if ours in indexes else indexes[0])
    if indexes:
        names = ", ".join(index.name for index in indexes)
        raise CheckpointMismatch(f"{path}: several indexes ({names}); give the path of the one to load")
    layers = merging.layer_files(path)
    if layers:
        return _merge_layers(path, layers)
    ranks = merging.rank_files(path)
    if len(ranks) > 1:
        return _merge(path, [_without_prefix(_open_file(rank)) for rank in ranks])
    for name in _SINGLE_FILES:
        if (path / name).is_file():
            return _open_file(path / name)
    shards = sorted(path.glob("tencentpretrain_model-*.bin"))
    if shards:
        return _join(path, {shard.name: _open_file(shard) for shard in shards})
    found = sorted(entry.name for entry in path.iterdir())
    holds = f"holds {', '.join(found[:6])}{' ...' if len(found) > 6 else ''}" if found else "is empty"
    raise CheckpointMismatch(
        f"{path}: no weights in this directory (looked for model.safetensors, *.index.json, "
        f"tencentpretrain_model-*.bin); it {holds}"
    )


def _open_index(index: Path) -> TensorFile:
    try:
        content = json.loads(index.read_text(encoding="utf-8-sig"))
        weight_map = {str(name): str(shard) for name, shard in content["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointMismatch(
            f"{index}: this is {_describe(index)}, not an index of shards with a weight_map"
        ) from error
    shards: dict[str, TensorFile] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointMismatch(f"{index}: shard {shard!r} lies outside the directory; refused")
        if not (index.parent / shard).is_file():
            lost = sum(1 for owner in weight_map.values() if owner == shard)
            raise CheckpointMismatch(
                f"{index.parent}: shard {shard} is missing; the index expects {lost} tensors in it"
            )
        shards[shard] = _open_file(index.parent / shard)
    absent = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if absent:
        raise CheckpointMismatch(
            f"{index}: {len(absent)} tensors of the index are not in their shards, "
            f"first {absent[0]!r} in {weight_map[absent[0]]}"
        )
    return _join(index.parent, shards)


def _join(path: Path, shards: Mapping[str, TensorFile]) -> TensorFile:
    entries: dict[str, _Entry] = {}
    owner: dict[str, str] = {}
    for shard, opened in shards.items():
        for name, entry in opened.entries.items():
            if name in entries:
                raise CheckpointMismatch(f"{path}: {name!r} stands in two shards, {owner[name]} and {shard}")
            entries[name] = entry
            owner[name] = shard
    return TensorFile(path=path, entries=entries)


def _merge(path: Path, ranks: list[TensorFile]) -> TensorFile:
    shapes = [{name: entry.shape for name, entry in rank.entries.items()} for rank in ranks]
    found = merging.merged(path, ranks, shapes)
    return TensorFile(path=path, entries={name: _Entry(*entry) for name, entry in found.items()})


def _merge_layers(path: Path, layers: list[list[Path]]) -> TensorFile:
    joined: dict[str, TensorFile] = {}
    for number, files in enumerate(layers):
        ranks = []
        for file in files:
            opened = _without_prefix(_open_file(file))
            entries = {
                merging.published_name(number, len(layers), name): entry for name, entry in opened.entries.items()
            }
            ranks.append(TensorFile(path=file, entries=entries))
        joined[files[0].name] = _merge(path, ranks)
    if not any(name.startswith("target.") for name in joined[layers[-1][0].name].entries):
        raise CheckpointMismatch(f"{path}: layer_{len(layers):02d}, which holds the target, is missing")
    return _join(path, joined)
