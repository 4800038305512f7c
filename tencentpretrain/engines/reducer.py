"""Sums gradients over processes while the backward pass still runs.

Torch's DistributedDataParallel rebuilds its buckets after the first step, so a resumed run sums in another order than
one never stopped, and it averages where a sum is wanted. Here buckets follow from the model alone: at one world size
runs are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tencentpretrain.engines.processes import Group

BUCKET_BYTES = 25 << 20
"""Gradients that travel together: enough to use the network, few enough to start early (torch's default)."""


class GradientReducer:
    """Sums the gradients of parameters over a group, bucket by bucket, last parameters first.

    Args:
        parameters: those that are trained, in the same order on all processes.
        group: whose gradients are summed.
    """

    def __init__(self, parameters: Sequence[Tensor], group: Group) -> None:
        self._group = group
        self._parameters = list(parameters)
        self._buckets = _cut(list(reversed(self._parameters)))
        self._bucket_of = {id(parameter): bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._next = 0
        self._armed = False
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._ready)  # type: ignore[no-untyped-call]

    def arm(self) -> None:
        """Says that the next backward pass is the last of the update: sums start as gradients become ready."""
        self._armed = True
        self._next = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> None:
        """Starts what has not been started, waits for all sums and puts them into `grad`. Collective."""
        present = torch.tensor([parameter.grad is not None for parameter in self._parameters], dtype=torch.float64)
        anywhere = self._group.sum_on_host(present).tolist()
        while self._next < len(self._buckets):
            self._launch()
        for bucket in self._buckets:
            bucket.collect()
        for parameter, count in zip(self._parameters, anywhere, strict=True):
            if not count:
                parameter.grad = None  # no process used it, so the optimizer must not touch it
        self._armed = False
        self._next = 0

    def _ready(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        self._bucket_of[id(parameter)].missing -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._launch()  # always in the same order, whichever is ready first

    def _launch(self) -> None:
        self._buckets[self._next].launch(self._group)
        self._next += 1


class _Bucket:
    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.missing = len(parameters)
        self._flat: Tensor | None = None
        self._work: dist.Work | None = None

    def launch(self, group: Group) -> None:
        parts = [
            torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()
            for parameter in self.parameters
        ]
        self._flat = torch.cat(parts)
        self._work = dist.all_reduce(self._flat, group=group.device, async_op=True)

    def collect(self) -> None:
        assert self._work is not None
        assert self._flat is not None
        self._work.wait()
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, part in zip(self.parameters, torch.split(self._flat, sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self._flat = self._work = None


def _cut(parameters: Sequence[Tensor]) -> list[_Bucket]:
    """Cuts parameters into buckets of one dtype and about BUCKET_BYTES."""
    buckets: list[list[Tensor]] = []
    size = 0
    for parameter in parameters:
        last = buckets[-1] if buckets else None
        if last is None or size + parameter.nbytes > BUCKET_BYTES or last[0].dtype != parameter.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return [_Bucket(bucket) for bucket in buckets]
