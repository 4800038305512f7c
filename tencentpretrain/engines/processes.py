"""The processes of a run and how they talk: one group for tensors on the device, one for numbers of the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Group:
    """Processes that share work.

    Fields:
        rank, size: this process's place among them.
        device: process group for tensors of the device (nccl or gloo); None for one process.
        host: gloo group for numbers of the host, so that they never wait for the device.
    """

    rank: int = 0
    size: int = 1
    device: dist.ProcessGroup | None = None
    host: dist.ProcessGroup | None = None

    def sum_on_host(self, numbers: Tensor) -> Tensor:
        """Returns the sum of a CPU tensor over the group. Collective."""
        if self.size == 1:
            return numbers
        total = numbers.clone()
        dist.all_reduce(total, group=self.host)
        return total

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set anywhere. Collective."""
        return bool(self.sum_on_host(torch.tensor([float(flag)], dtype=torch.float64)).item())


def whole_world() -> Group:
    """Returns the group of all processes of an initialised `torch.distributed`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Group()
    world = dist.group.WORLD
    host: Any = world if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return Group(rank=dist.get_rank(), size=dist.get_world_size(), device=world, host=host)
