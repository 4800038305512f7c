"""The bytes of a file of tensors: safetensors, or what torch.save makes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import IO, Any, Literal, cast

import torch
from torch import Tensor

from tencentpretrain.data.durable import DurableFile

Format = Literal["bin", "safetensors"]

TIED_KEY = "tied"
"""Metadata of our safetensors files: JSON object, second name of a tied tensor -> the name it is stored under."""

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {DTYPES[code]: rank for rank, code in enumerate(
    ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
)}  # fmt: skip
"""The writer puts wide formats first, so that every tensor is aligned."""

_BIN_MEMBER, _BIN_REFERENCE, _BIN_FRAME = 190, 75, 1100
"""Bytes of a torch file beside its tensors: for a stored tensor, for a name, for the whole."""


def put_tensors(
    file: DurableFile, tensors: Mapping[str, Tensor], format: Format, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors into an open file, as `write_tensors` does."""
    kept, tied = _compact(tensors)
    if format == "safetensors":
        stored = {name: tensor for name, tensor in kept.items() if name not in tied}
        header, order = _safetensors_header(stored, tied, metadata)
        file.write(header)
        for name in order:
            file.write(stored[name].reshape(-1).view(torch.uint8).numpy())
        return
    try:
        torch.save(
            kept, cast(IO[bytes], file)
        )  # an open file, because torch.save would write the file's name into the bytes
    except RuntimeError:
        if file.error is not None:
            raise file.error from None
        raise


def stored_size(
    tensors: Mapping[str, Tensor], format: Format = "safetensors", metadata: Mapping[str, str] | None = None
) -> int:
    """Returns how many bytes a file of these tensors takes: exactly for safetensors, closely for `.bin`."""
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        original = first.setdefault(_identity(name, tensor), name)
        if original != name:
            tied[name] = original
    stored = {name: tensor for name, tensor in tensors.items() if name not in tied}
    total = sum(tensor.nbytes for tensor in stored.values())
    if format == "safetensors":
        return len(_safetensors_header(stored, tied, metadata)[0]) + total
    # A member of the archive: local header, padding to 64 bytes, entry in the directory; then its place in the pickle.
    members = sum(_BIN_MEMBER + (-tensor.nbytes) % 64 for tensor in stored.values())
    names = sum(len(name) for name in tensors)
    return total + members + names + _BIN_REFERENCE * len(tensors) + _BIN_FRAME


def _safetensors_header(
    stored: Mapping[str, Tensor], tied: Mapping[str, str], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[str]]:
    """Returns length and header of a safetensors file, and the order of its tensors: as safetensors' own writer."""
    notes = dict(metadata or {})
    if tied:
        notes[TIED_KEY] = json.dumps(tied, sort_keys=True)
    header: dict[str, Any] = {"__metadata__": dict(sorted(notes.items()))} if notes else {}
    order = sorted(stored, key=lambda name: (-_RANKS[stored[name].dtype], name))
    offset = 0
    for name in order:
        tensor = stored[name]
        end = offset + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def _identity(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """What makes two names one tensor."""
    if not tensor.numel():
        return (name,)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _compact(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Moves tensors to the CPU, cuts views out of larger storages, and finds those that are the same."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        key = _identity(name, tensor)
        if key in first:
            tied[name] = first[key]
            kept[name] = kept[first[key]]
            continue
        first[key] = name
        compact = tensor.cpu().contiguous()
        if compact.untyped_storage().nbytes() != compact.nbytes:
            compact = compact.clone()
        kept[name] = compact
    return kept, tied
