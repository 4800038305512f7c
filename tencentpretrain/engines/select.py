"""Chooses the engine of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tencentpretrain.config.run import RunConfig
from tencentpretrain.engines.base import Engine
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.engines.processes import whole_world
from tencentpretrain.engines.replicas import ReplicaEngine


@contextmanager
def open_engine(run: RunConfig) -> Iterator[Engine]:
    """Yields the engine that the settings and the launcher ask for; processes part when the block ends."""
    group = whole_world()
    yield LocalEngine(run.precision) if group.size == 1 else ReplicaEngine(run.precision, group)
