"""Chooses the engine of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist

from tencentpretrain.config.launcher import Place, read_place
from tencentpretrain.config.run import RunConfig
from tencentpretrain.config.train import LaunchConfig, PrecisionConfig
from tencentpretrain.engines.base import Engine
from tencentpretrain.engines.deepspeed import build_engine
from tencentpretrain.engines.fsdp import ShardedEngine
from tencentpretrain.engines.joining import joined, local_device, local_threads
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.engines.mesh import MeshEngine
from tencentpretrain.engines.processes import Group, whole_world
from tencentpretrain.engines.replicas import ReplicaEngine
from tencentpretrain.parallel.mesh import build_mesh


@contextmanager
def open_engine(run: RunConfig) -> Iterator[Engine]:
    """Yields the engine that the settings and the launcher ask for; processes part when the block ends."""
    with _met(run.precision, run.launch) as (precision, group):
        yield _engine(replace(run, precision=precision), group)


@contextmanager
def open_replicas(precision: PrecisionConfig) -> Iterator[LocalEngine]:
    """Yields an engine with whole weights on every process of the launcher, for downstream tasks."""
    with _met(precision, LaunchConfig()) as (precision, group):
        yield LocalEngine(precision) if group.size == 1 else ReplicaEngine(precision, group)


@contextmanager
def _met(precision: PrecisionConfig, launch: LaunchConfig) -> Iterator[tuple[PrecisionConfig, Group]]:
    """Joins the other processes and yields the settings of this one."""
    place = None if dist.is_initialized() else read_place()
    if place is not None:
        precision = _localized(precision, place)
    together: AbstractContextManager[None] = nullcontext()
    if place is not None and place.world_size > 1:
        backend = launch.backend if precision.device != "cpu" else "gloo"
        together = joined(place, backend=backend, seconds=launch.join_timeout)
    with together:
        yield precision, whole_world()


def _engine(run: RunConfig, group: Group) -> Engine:
    tensor, pipeline = run.launch.tensor_model_parallel_size, run.launch.pipeline_model_parallel_size
    if tensor * pipeline > 1:
        shard_optimizer = run.deepspeed is not None and run.deepspeed.stage == 1
        return MeshEngine(run.precision, build_mesh(tensor, pipeline), shard_optimizer=shard_optimizer)
    if run.deepspeed is not None:
        return build_engine(run.precision, run.deepspeed, group)
    if run.launch.fsdp and group.size > 1:
        return ShardedEngine(run.precision, group)
    return LocalEngine(run.precision) if group.size == 1 else ReplicaEngine(run.precision, group)


def _localized(precision: PrecisionConfig, place: Place) -> PrecisionConfig:
    """Returns the settings with the device and the threads of this process."""
    threads = precision.threads or (local_threads(place) if place.local_world_size > 1 else None)
    device = local_device(precision.device, place)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # before the first collective, which otherwise takes the first GPU
    return precision.model_copy(update={"device": device, "threads": threads})
