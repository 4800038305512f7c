"""Cross-entropy over a large vocabulary, summed, without a float32 copy of all logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 20
"""Logits that are widened to float32 at a time: few enough to stay in a core's cache."""


class _CrossEntropySum(torch.autograd.Function):
    """Keeps the logits; the backward pass exponentiates them again, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        rows = max(1, CHUNK // logits.size(1))
        maxima, log_sums, losses = [], [], []
        for chunk, label in zip(torch.split(logits, rows), torch.split(labels, rows), strict=True):
            wide = chunk.to(torch.float32, copy=True)
            maximum = wide.amax(dim=1, keepdim=True)
            chosen = wide.gather(1, label[:, None]) - maximum
            log_sum = wide.sub_(maximum).exp_().sum(dim=1, keepdim=True).log_()
            maxima.append(maximum)
            log_sums.append(log_sum)
            losses.append((log_sum - chosen).sum())
        ctx.save_for_backward(logits, labels, torch.cat(maxima), torch.cat(log_sums))
        ctx.rows = rows
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels, maxima, log_sums = ctx.saved_tensors
        output = torch.empty_like(logits)
        chunks = (torch.split(x, ctx.rows) for x in (logits, labels, maxima, log_sums, output))
        for chunk, label, maximum, log_sum, target in zip(*chunks, strict=True):
            scaled = (chunk.float() - maximum).exp_().mul_(gradient * torch.exp(-log_sum))
            scaled.scatter_add_(1, label[:, None], -gradient.expand(len(label), 1))
            target.copy_(scaled)
        return output, None


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the sum over rows of -log softmax(logits)[label], computed in float32.

    Shapes (N rows, V classes):
        logits: (N, V), any floating type; its gradient has the same type.
        labels: (N,) int64, each from 0 to V - 1.
        result: () float32.
    """
    if logits.device.type != "cpu" or torch.compiler.is_compiling() or logits.numel() <= CHUNK:
        return F.cross_entropy(logits.float(), labels, reduction="sum")
    total: Tensor = _CrossEntropySum.apply(logits, labels)
    return total
