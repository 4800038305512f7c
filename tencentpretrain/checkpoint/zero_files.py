"""DeepSpeed's own checkpoint directories (ZeRO stages 0 to 3), read without running what their pickles name.

A directory holds a folder per tag and the file `latest` with the newest tag. A folder holds the 16-bit weights
(`mp_rank_00_model_states.pt`) and, per process, flat float32 parts of weights and optimizer
(`zero_pp_rank_<r>_mp_rank_00_optim_states.pt`), cut without regard to tensors.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tencentpretrain.errors import CheckpointMismatch

_PART = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_WEIGHTS = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_HARMLESS = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
)
"""Classes that such files name beside tensors; they are read as inert values."""


class Pieces(Mapping[str, Tensor]):
    """Tensors that are put together when they are asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True, kw_only=True)
class ZeroCheckpoint:
    """What a DeepSpeed directory holds.

    Fields:
        path: the folder of the tag.
        model: weights by name; float32 where the directory has them.
        optimizer: state as "<parameter>/<what>"; empty if there is none that can be continued.
    """

    path: Path
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


def read_zero_checkpoint(path: str | Path) -> ZeroCheckpoint:
    """Opens a DeepSpeed directory, or the folder of one of its tags.

    Raises:
        CheckpointMismatch: it is none, parts are missing, or a file asks for code to be run.
    """
    folder = _tag_folder(Path(path))
    weights = _numbered(folder, _WEIGHTS)
    parts = _numbered(folder, _PART)
    if not weights:
        raise CheckpointMismatch(f"{folder}: holds no *_model_states.pt, so it is no checkpoint of DeepSpeed")
    states = [_load(file) for file in weights]
    if not parts:
        module = states[0].get("module") or {}
        return ZeroCheckpoint(path=folder, model=_named(_of_module(module)), optimizer={})
    loaded = [_load(file) for file in parts]
    optims = [content["optimizer_state_dict"] for content in loaded]
    stage = _plain(optims[0].get("zero_stage", 2))
    expected = optims[0].get("partition_count", len(parts))
    expected = max(expected) if isinstance(expected, (list, tuple)) else expected
    if len(parts) != int(expected):
        raise CheckpointMismatch(
            f"{folder}: {len(parts)} of {expected} *_optim_states.pt files are there; bring the others too"
        )
    shapes = states[0].get("param_shapes")
    if not shapes:
        raise CheckpointMismatch(f"{folder}: its model states name no shapes (param_shapes); it is too old to be read")
    if stage == 3 and len(weights) != len(parts):
        raise CheckpointMismatch(f"{folder}: {len(weights)} of {len(parts)} *_model_states.pt files are there")
    groups = [dict(group) for group in (shapes if isinstance(shapes, list) else [shapes])]
    cut = _cut_by_parameter if stage == 3 else _cut_by_group
    flats = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    model = dict(_of_module(states[0].get("module") or {}, only=None if stage < 3 else states[0].get("buffer_names")))
    model |= _frozen(states)
    model |= cut(groups, [optim[flats] for optim in optims])
    for twin, source in (states[0].get("shared_params") or {}).items():
        if source in model:
            model[twin] = model[source]
    return ZeroCheckpoint(path=folder, model=_named(model), optimizer=_named(_moments(groups, optims, stage, cut)))


Maker = Callable[[], Tensor]
Flats = Sequence[Sequence[Tensor]]
"""By process and group."""


def _cut_by_group(groups: Sequence[Mapping[str, Any]], flats: Flats) -> dict[str, Maker]:
    """Stages 1 and 2: the tensors of a group follow each other and the row is cut evenly."""
    makers: dict[str, Maker] = {}
    for number, group in enumerate(groups):
        row = [flat[number] for flat in flats]
        begin = 0
        for name, shape in group.items():
            makers[name] = _maker(row, begin, tuple(shape))
            begin += math.prod(shape)
    return makers


def _maker(row: Sequence[Tensor], begin: int, shape: tuple[int, ...]) -> Maker:
    def make() -> Tensor:
        found, place, end = [], 0, begin + math.prod(shape)
        for part in row:
            first, last = max(begin - place, 0), min(end - place, part.numel())
            if first < last:
                found.append(part[first:last])
            place += part.numel()
        return torch.cat(found).view(shape) if found else torch.zeros(shape)

    return make


def _cut_by_parameter(groups: Sequence[Mapping[str, Any]], flats: Flats) -> dict[str, Maker]:
    """Stage 3: each tensor is cut evenly, and each process has its parts one after the other."""
    makers: dict[str, Maker] = {}
    begin = 0
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        length = -(-math.prod(shape) // len(flats))

        def make(begin: int = begin, length: int = length, shape: tuple[int, ...] = tuple(shape)) -> Tensor:
            parts = [_maker(row, begin, (length,))() for row in flats]
            return torch.cat(parts)[: math.prod(shape)].view(shape)

        makers[name] = make
        begin += length
    return makers


def _moments(
    groups: Sequence[Mapping[str, Any]],
    optims: Sequence[Mapping[str, Any]],
    stage: int,
    cut: Callable[[Sequence[Mapping[str, Any]], Flats], dict[str, Maker]],
) -> dict[str, Maker]:
    """Returns Adam's moments and step by name; nothing if it is the state of another optimizer."""
    rows = [_states(optim["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]) for optim in optims]
    if not all(row and all({"exp_avg", "exp_avg_sq"} <= set(state) for state in row) for row in rows):
        return {}
    makers: dict[str, Maker] = {}
    for kind in ("exp_avg", "exp_avg_sq"):
        found = cut(groups, [[state[kind] for state in row] for row in rows])
        makers |= {f"{name}/{kind}": make for name, make in found.items()}
    step = int(max(state.get("step", 0) for state in rows[0]))
    names = [name for group in groups for name in group]
    return makers | {f"{name}/step": lambda: torch.tensor(step) for name in names}


def _states(saved: Any) -> list[Mapping[str, Any]]:
    if isinstance(saved, Mapping):
        saved = [saved["state"][key] for key in sorted(saved.get("state", {}))]
    return [state for state in saved if isinstance(state, Mapping)]


def _of_module(module: Mapping[str, Any], only: Sequence[str] | None = None) -> Iterator[tuple[str, Maker]]:
    for name, tensor in module.items():
        if isinstance(tensor, Tensor) and (only is None or name in only):
            yield name, partial(torch.Tensor.detach, tensor)


def _frozen(states: Sequence[Mapping[str, Any]]) -> dict[str, Maker]:
    """Returns the weights that were not trained."""
    shapes = states[0].get("frozen_param_shapes") or {}
    fragments = [state.get("frozen_param_fragments") or {} for state in states]
    makers: dict[str, Maker] = {}
    for name, shape in shapes.items():

        def make(name: str = name, shape: tuple[int, ...] = tuple(shape)) -> Tensor:
            whole = torch.cat([parts[name].flatten() for parts in fragments])
            return whole[: math.prod(shape)].view(shape)

        if all(name in parts for parts in fragments):
            makers[name] = make
    return makers


def _named(makers: Mapping[str, Maker] | Iterator[tuple[str, Maker]]) -> Pieces:
    """Takes off the name under which the model was wrapped."""
    found = dict(makers)
    for prefix in ("module.", "model."):
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): make for name, make in found.items()}
    return Pieces(found)


def _tag_folder(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointMismatch(f"{path}: there is no such directory; --resume_from_checkpoint takes one of DeepSpeed")
    latest = path / "latest"
    if not latest.is_file():
        return path
    folder = path / latest.read_text(encoding="utf-8", errors="replace").strip()
    if not folder.is_dir():
        raise CheckpointMismatch(f"{latest}: names {folder.name!r}, but there is no such folder beside it")
    return folder


def _numbered(folder: Path, form: re.Pattern[str]) -> list[Path]:
    """Returns the files of a form by the number of the process."""
    found: dict[int, Path] = {}
    for file in folder.iterdir():
        match = form.fullmatch(file.name)
        if match and int(match[2]) > 0:
            raise CheckpointMismatch(
                f"{file}: a part of a tensor-parallel model, which is not read from DeepSpeed's directories; "
                "convert it to whole weights and give them as --pretrained_model_path"
            )
        if match:
            found[int(match[1] or 0)] = file
    return [found[number] for number in sorted(found)]


class _Inert:
    """Stands for an object of DeepSpeed: it keeps what it was made of and does nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _plain(value: Any) -> int:
    return int(value.values[0]) if isinstance(value, _Inert) else int(value)


def _load(file: Path) -> dict[str, Any]:
    allowed: list[Any] = [(_Inert, name) for name in _HARMLESS]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"for {wanted[1]}" if wanted else "to run code"
        raise CheckpointMismatch(
            f"{file}: asks {what}, which is not allowed; give the weights alone as --pretrained_model_path"
        ) from None
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointMismatch(f"{file}: truncated or damaged torch file ({reason})") from None
    if not isinstance(content, dict):
        raise CheckpointMismatch(f"{file}: holds {type(content).__name__}, not a checkpoint of DeepSpeed")
    return content
