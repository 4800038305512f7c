"""The processes of a run and how they talk: one group for tensors on the device, one for numbers of the host."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from tencentpretrain.parallel.group import Group

__all__ = ["Group", "whole_world"]


def whole_world() -> Group:
    """Returns the group of all processes of an initialised `torch.distributed`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Group()
    world = dist.group.WORLD
    host: Any = world if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return Group(rank=dist.get_rank(), size=dist.get_world_size(), device=world, host=host)
