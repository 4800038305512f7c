"""Which process holds which part: data, tensor and pipeline groups of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from tencentpretrain.errors import ConfigError
from tencentpretrain.parallel.group import Group


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of a process: which stage of the pipeline, which share of the data, which slice of the matrices."""

    stage: int
    data: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The groups that this process belongs to.

    Fields:
        world: all processes.
        tensor: they hold the slices of one stage of one replica.
        pipeline: they hold the stages of one replica, first to last.
        data: they hold the same slice of the same stage.
        stage: they hold the same stage: all its slices in all replicas; tensor ranks vary fastest.
    """

    world: Group
    tensor: Group
    pipeline: Group
    data: Group
    stage: Group


def place_of(rank: int, world_size: int, tensor_size: int, pipeline_size: int) -> Place:
    """Returns the place of a process: tensor ranks are neighbours, stages are blocks of world_size / pipeline_size.

    Raises:
        ConfigError: the sizes do not divide the world.
    """
    parts = tensor_size * pipeline_size
    if world_size % parts:
        raise ConfigError(
            f"{world_size} processes cannot be cut into replicas of tensor_model_parallel_size {tensor_size} x "
            f"pipeline_model_parallel_size {pipeline_size}; start a multiple of {parts}"
        )
    stage, inner = divmod(rank, world_size // pipeline_size)
    return Place(stage=stage, data=inner // tensor_size, tensor=inner % tensor_size)


def build_mesh(tensor_size: int = 1, pipeline_size: int = 1) -> Mesh:
    """Returns the groups of an initialised `torch.distributed`. Collective.

    Raises:
        ConfigError: the sizes do not divide the world.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    places = [place_of(other, size, tensor_size, pipeline_size) for other in range(size)]
    mine = places[rank]
    world = _group(rank, [list(range(size))])

    def along(*fixed: str) -> Group:
        keys = [tuple(getattr(place, name) for name in fixed) for place in places]
        return _group(rank, [[r for r in range(size) if keys[r] == key] for key in dict.fromkeys(keys)])

    mesh = Mesh(
        world=world,
        tensor=along("stage", "data"),
        pipeline=along("data", "tensor"),
        data=along("stage", "tensor"),
        stage=along("stage"),
    )
    assert (mesh.pipeline.rank, mesh.data.rank, mesh.tensor.rank) == (mine.stage, mine.data, mine.tensor)
    return mesh


def groups_across(mesh: Mesh, stages: Sequence[int]) -> Group:
    """Makes, in every pipeline, a group of some of its stages and returns this process's; all processes call it."""
    each = mesh.world.size // mesh.pipeline.size
    parts = [[stage * each + inner for stage in stages] for inner in range(each)]
    return _group(mesh.world.rank, parts)


def _group(rank: int, parts: Sequence[list[int]]) -> Group:
    """Makes one group of each part, on every process in the same order, and returns the one `rank` belongs to."""
    found = Group()
    for members, device, host in _made(parts):
        if rank in members and len(members) > 1:
            found = Group(rank=members.index(rank), size=len(members), device=device, host=host)
    return found


def _made(parts: Sequence[list[int]]) -> Iterator[tuple[list[int], Any, Any]]:
    gloo = dist.get_backend() == "gloo"
    for members in parts:
        if len(members) == dist.get_world_size():
            device: Any = dist.group.WORLD
        else:
            device = dist.new_group(members) if len(members) > 1 else None
        host = device if gloo or len(members) == 1 else dist.new_group(members, backend="gloo")
        yield members, device, host
