"""Weights cut into several files, with an index of which tensor is where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from tencentpretrain.checkpoint.atomic import publish_directory
from tencentpretrain.checkpoint.files import write_tensors
from tencentpretrain.data.durable import storage_errors, write_durably
from tencentpretrain.errors import ResourceError

INDEX_NAME = "tencentpretrain_model.bin.index.json"
_ELEMENTS_PER_BLOCK = 5 * 10**8
"""A block size of 1 is this many elements: a gigabyte at two bytes each."""


def write_shards(folder: str | Path, tensors: Mapping[str, Tensor], *, block_size: float = 10) -> None:
    """Writes a directory of shards and their index, which appears whole or not at all.

    A shard is full when a tensor takes its count of elements above `block_size` gigabytes at two bytes each.

    Raises:
        ResourceError: the directory exists already, the disk is full or cannot be written.
    """
    folder = Path(folder)
    shards = list(_cut(tensors, block_size * _ELEMENTS_PER_BLOCK))

    def write(place: Path) -> None:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards):
            shard = f"tencentpretrain_model-{number}.bin"
            write_tensors(place / shard, {name: tensors[name] for name in names})
            weight_map |= dict.fromkeys(names, shard)
        total_size = 2 * sum(tensor.numel() for tensor in tensors.values())
        index = {"weight_map": weight_map, "metadata": {"total_size": total_size}}
        write_durably(place / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())

    if folder.exists():
        raise ResourceError(f"{folder}: exists already; name a new directory for the shards")
    with storage_errors(folder, sum(tensor.nbytes for tensor in tensors.values())):
        publish_directory(folder, write)


def _cut(tensors: Mapping[str, Tensor], limit: float) -> Iterator[list[str]]:
    names: list[str] = []
    count = 0
    for name, tensor in tensors.items():
        names.append(name)
        count += tensor.numel()
        if count > limit:
            yield names
            names, count = [], 0
    if names:
        yield names
