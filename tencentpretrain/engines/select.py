"""Chooses the engine of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from tencentpretrain.config.launcher import Place, read_place
from tencentpretrain.config.run import RunConfig
from tencentpretrain.engines.base import Engine
from tencentpretrain.engines.deepspeed import build_engine
from tencentpretrain.engines.joining import joined, local_device, local_threads
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.engines.processes import Group, whole_world
from tencentpretrain.engines.replicas import ReplicaEngine


@contextmanager
def open_engine(run: RunConfig) -> Iterator[Engine]:
    """Yields the engine that the settings and the launcher ask for; processes part when the block ends."""
    place = None if dist.is_initialized() else read_place()
    if place is not None:
        run = _localized(run, place)
    joining = joined(place, **_meeting(run)) if place is not None and place.world_size > 1 else nullcontext()
    with joining:
        yield _engine(run, whole_world())


def _engine(run: RunConfig, group: Group) -> Engine:
    if run.deepspeed is not None:
        return build_engine(run.precision, run.deepspeed, group)
    return LocalEngine(run.precision) if group.size == 1 else ReplicaEngine(run.precision, group)


def _localized(run: RunConfig, place: Place) -> RunConfig:
    """Returns the run with the device and the threads of this process."""
    precision = run.precision
    threads = precision.threads or (local_threads(place) if place.local_world_size > 1 else None)
    device = local_device(precision.device, place)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # before the first collective, which otherwise takes the first GPU
    return replace(run, precision=precision.model_copy(update={"device": device, "threads": threads}))


def _meeting(run: RunConfig) -> dict[str, Any]:
    backend = run.launch.backend if run.precision.device != "cpu" else "gloo"
    return {"backend": backend, "seconds": run.launch.join_timeout}
