"""Cross-entropy over a vocabulary of which each process holds some rows of the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tencentpretrain.data.batch import IGNORE_LABEL
from tencentpretrain.parallel.group import Group
from tencentpretrain.targets.base import LossSum

CHUNK = 1 << 23
"""Logits of this process that exist at a time, in float32."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """How a vocabulary is spread: this process has the rows from `first` on, as many as its slice of the head has."""

    size: int
    first: int
    group: Group


class _SplitCrossEntropy(torch.autograd.Function):
    """Computes gradients chunk by chunk while the probabilities are at hand; logits never exist whole.

    The loss of a row is (1 - smoothing - each) (lse - z_label) + each (V lse - sum z), each = smoothing / (V - 1)
    (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        kept: Tensor,
        smoothing: float,
        vocabulary: Vocabulary,
    ) -> tuple[Tensor, Tensor]:
        each = smoothing / (vocabulary.size - 1) if smoothing else 0.0
        right = 1 - smoothing - each
        needs = any(ctx.needs_input_grad[:3])
        grad_rows = torch.empty_like(rows) if needs else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs else None
        grad_bias = torch.zeros(weight.size(0), dtype=torch.float32, device=weight.device) if needs else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        predicted = []
        step = max(1, CHUNK // max(weight.size(0), 1))
        for start in range(0, len(labels), step):
            part, weigh = rows[start : start + step], kept[start : start + step, None]
            narrow = F.linear(part, weight, bias)
            logits = narrow.float()
            local = labels[start : start + step, None] - vocabulary.first
            here = (local >= 0) & (local < weight.size(0))
            local = local.clamp(0, weight.size(0) - 1)
            own_max, own_best = logits.max(dim=1, keepdim=True)
            maximum = own_max.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=vocabulary.group.device)
            predicted.append(torch.where(own_max == maximum, own_best + vocabulary.first, vocabulary.size))
            chosen = logits.gather(1, local) * here
            exponentials = torch.exp(logits - maximum)
            sums = [exponentials.sum(1, keepdim=True), chosen]
            if each:
                sums.append(logits.sum(1, keepdim=True))
            summed = vocabulary.group.sum(torch.cat(sums, dim=1))
            lse = summed[:, :1].log() + maximum
            loss = right * (lse - summed[:, 1:2])
            if each:
                loss = loss + each * (vocabulary.size * lse - summed[:, 2:])
            total += (loss * weigh).sum()
            if grad_rows is None or grad_weight is None or grad_bias is None:
                continue
            gradient = exponentials.mul_((right + each * vocabulary.size) / summed[:, :1])
            gradient.scatter_add_(1, local, -right * here.to(gradient.dtype))
            if each:
                gradient.sub_(each)
            gradient = gradient.mul_(weigh)
            grad_bias += gradient.sum(0)
            low = gradient.to(narrow.dtype)
            grad_rows[start : start + step] = (low @ weight.to(low.dtype)).to(rows.dtype)
            grad_weight += (low.t() @ part.to(low.dtype)).float()
        ctx.has_bias = bias is not None
        if needs:
            ctx.save_for_backward(grad_rows, grad_weight, grad_bias)
            ctx.dtype = weight.dtype
        best = torch.cat(predicted) if predicted else labels.new_zeros((0, 1))
        dist.all_reduce(best, op=dist.ReduceOp.MIN, group=vocabulary.group.device)
        correct = (best.squeeze(1) == labels).sum()
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias = ctx.saved_tensors
        factor = float(gradient) if gradient.device.type == "cpu" else gradient
        return (
            (rows * factor).to(rows.dtype),
            (weight * factor).to(ctx.dtype),
            (bias * factor).to(ctx.dtype) if ctx.has_bias else None,
            None,
            None,
            None,
            None,
        )


def split_cross_entropy(
    rows: Tensor,
    head: torch.nn.Linear,
    labels: Tensor,
    vocabulary: Vocabulary,
    *,
    smoothing: float | None = None,
    ignored_label: int | None = None,
) -> LossSum:
    """Returns the summed loss of labels, equal on all processes of the vocabulary. Collective.

    Shapes:
        rows: (N, H), equal on all processes; their gradients are to be summed over the processes (`enter`).
        labels: (N,) int64; IGNORE_LABEL does not count.

    Args:
        head: this process's slice.
        smoothing, ignored_label: as in `targets.loss.smoothed_sum`.
    """
    counted = labels != IGNORE_LABEL
    kept = counted if ignored_label is None or smoothing is None else counted & (labels != ignored_label)
    total, correct = _SplitCrossEntropy.apply(
        rows, head.weight, head.bias, labels, kept.float(), smoothing or 0.0, vocabulary
    )
    return LossSum(total=total, count=counted.sum(), correct=correct)
