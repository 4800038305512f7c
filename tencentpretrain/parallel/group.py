"""Processes that share work, and how they talk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a tensor of the device over the group. Collective."""
        if self.size == 1:
            return values
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.device)
        return total

    def gather(self, value: T) -> list[T]:
        """Returns the value of each process, by rank. Collective; values travel as pickles among the run itself."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set anywhere. Collective."""
        return bool(self.sum_on_host(torch.tensor([float(flag)], dtype=torch.float64)).item())
