"""Checkpoints in one file per tensor-parallel rank, or per layer and rank, read as whole tensors.

`mp_rank_00_model_states.pt`, ... hold the slices of all tensors. `layer_00-model_00-model_states.pt`, ... hold the
embedding (layer 0), the blocks (1 to n) and the target (n + 1), under the names of DeepSpeed's pipeline.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tencentpretrain.errors import CheckpointMismatch

RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")

_CUT_BY_ROWS = re.compile(
    r"(.+\.)?(word\.embedding\.weight|linear_layers\.[012]\.(weight|bias)|feed_forward\.linear_(1|gate)\.(weight|bias)"
    r"|target\.(lm|bilm)\.output_layer\.(weight|bias)|target\.mlm\.linear_2\.(weight|bias))"
)
_CUT_BY_COLUMNS = re.compile(
    r"(.+\.)?(final_linear\.weight|feed_forward\.linear_2\.weight|relative_attention_bias\.weight)"
)

Shape = tuple[int, ...]
Found = tuple[Shape, torch.dtype, Callable[[], Tensor]]


def cut_dimension(name: str) -> int | None:
    """Returns the dimension along which ranks hold blocks of a tensor; None where each holds all of it."""
    if _CUT_BY_ROWS.fullmatch(name):
        return 0
    return 1 if _CUT_BY_COLUMNS.fullmatch(name) else None


def rank_files(folder: Path) -> list[Path]:
    """Returns the files of a tensor-parallel directory, by rank; none if it is no such directory.

    Raises:
        CheckpointMismatch: a rank is missing.
    """
    found = {int(match[1]): path for path in folder.iterdir() if (match := RANK_FILE.fullmatch(path.name))}
    _require_all(folder, found, "mp_rank_{:02d}_model_states.pt")
    return [found[rank] for rank in sorted(found)]


def layer_files(folder: Path) -> list[list[Path]]:
    """Returns the files of a pipeline directory, by layer and rank; none if it is no such directory.

    Raises:
        CheckpointMismatch: a layer or a rank of one is missing.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in folder.iterdir():
        match = LAYER_FILE.fullmatch(path.name)
        if match:
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    ranks = {rank for layer in found.values() for rank in layer}
    _require_all(folder, found, "layer_{:02d}-model_00-model_states.pt")
    for layer, files in found.items():
        _require_all(folder, files, f"layer_{layer:02d}-model_{{:02d}}-model_states.pt", len(ranks))
    return [[found[layer][rank] for rank in sorted(found[layer])] for layer in sorted(found)]


def _require_all(folder: Path, found: Mapping[int, object], form: str, count: int | None = None) -> None:
    expected = max(found) + 1 if found and count is None else count or 0
    missing = [number for number in range(expected) if number not in found]
    if missing:
        raise CheckpointMismatch(f"{folder}: {form.format(missing[0])} is missing; its part of the weights was there")


def published_name(layer: int, layers: int, name: str) -> str:
    """Returns the toolkit's name of a tensor in the file of a pipeline layer.

    Raises:
        CheckpointMismatch: the layer has no tensor of that name.
    """
    if layer == 0 and name.startswith("embeddings."):
        return "embedding." + name.removeprefix("embeddings.")
    if layer == layers - 1 and name.startswith("target_layer."):
        return "target." + name.removeprefix("target_layer.")
    if name.startswith("layer."):
        return f"encoder.transformer.{layer - 1}." + name.removeprefix("layer.")
    if name.startswith("layer_norm."):
        return f"encoder.{name}"
    raise CheckpointMismatch(f"layer_{layer:02d}: holds {name!r}, which no pipeline checkpoint of the toolkit has")


def merged(
    folder: Path, ranks: Sequence[Mapping[str, Tensor]], shapes: Sequence[Mapping[str, Shape]]
) -> dict[str, Found]:
    """Returns whole tensors from the files of all ranks: shape, number format, and how to read them.

    Args:
        ranks: the tensors of each rank by published name.
        shapes: their shapes.

    Raises:
        CheckpointMismatch: the ranks hold different tensors; when read, that they differ where they should be equal.
    """
    whole: dict[str, Found] = {}
    for rank, shape in enumerate(shapes):
        other = sorted(set(shape) ^ set(shapes[0]))
        if other:
            raise CheckpointMismatch(f"{folder}: ranks 0 and {rank} hold different tensors, first {other[0]!r}")
    for name, first in shapes[0].items():
        dim = cut_dimension(name) if len(ranks) > 1 else None
        parts = [shape[name] for shape in shapes]
        if dim is None:
            size = first
        else:
            rest = {part[:dim] + part[dim + 1 :] for part in parts}
            if len(rest) > 1:
                raise CheckpointMismatch(f"{folder}: the parts of {name} have shapes that do not join: {parts}")
            size = (*first[:dim], sum(part[dim] for part in parts), *first[dim + 1 :])
        dtype = ranks[0][name].dtype
        whole[name] = (size, dtype, partial(_join, folder, name, ranks, dim))
    return whole


def _join(folder: Path, name: str, ranks: Sequence[Mapping[str, Tensor]], dim: int | None) -> Tensor:
    tensors = [rank[name] for rank in ranks]
    if dim is not None:
        return torch.cat(tensors, dim)
    for rank, tensor in enumerate(tensors):
        if not torch.equal(tensor, tensors[0]):
            raise CheckpointMismatch(
                f"{folder}: {name} differs between ranks 0 and {rank}, though each should hold all of it; "
                "the files are of different runs or of another way of cutting"
            )
    return tensors[0]
