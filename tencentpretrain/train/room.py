"""Refuses a run that cannot fit into memory, before its model is built."""

from __future__ import annotations

from tencentpretrain.config.launcher import read_place
from tencentpretrain.config.run import RunConfig
from tencentpretrain.engines.base import Engine
from tencentpretrain.plan.advice import Room, planner, require_room
from tencentpretrain.plan.machine import device_memory, host_memory
from tencentpretrain.plan.sharding import sharding_of


def check_memory(run: RunConfig, engine: Engine, vocab_size: int, tgt_vocab_size: int | None) -> None:
    """Compares what the run is sure to need with what the device has left; an unknown amount is no obstacle.

    Raises:
        ResourceError: it cannot fit.
    """
    on_gpu = engine.device.type == "cuda"
    free = device_memory(engine.device.index or 0) if on_gpu else host_memory()
    if free is None:
        return
    place = read_place()
    processes = 1 if on_gpu or engine.world_size == 1 else place.local_world_size if place else engine.world_size
    sharding = sharding_of(run, world_size=engine.world_size, other_device=on_gpu)
    where = f"GPU {engine.device.index or 0}" if on_gpu else "this machine"
    require_room(run, sharding, planner(vocab_size, tgt_vocab_size), Room(device=free, processes=processes), where)
