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
    """Computes the gradient while the probabilities are at hand, and keeps it in the type of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses, hits = [], []
        rows = max(1, CHUNK // logits.size(1))
        for start in range(0, len(labels), rows):
            label = labels[start : start + rows, None]
            counted = label >= 0
            label = label.clamp(min=0)
            wide = logits[start : start + rows].float()
            maximum = wide.amax(dim=1, keepdim=True)
            chosen = wide.gather(1, label)
            probabilities = torch.softmax(wide, dim=1)
            # The largest probability is exp(0) over the sum, so its logarithm gives the sum's without another pass.
            log_sum = probabilities.amax(dim=1, keepdim=True).log().neg()
            losses.append(((log_sum + (maximum - chosen)) * counted).sum())
            candidates = ((chosen == maximum) & counted).squeeze(1).nonzero().squeeze(1)
            predicted = wide.index_select(0, candidates).argmax(dim=1, keepdim=True)  # the first of equal maxima
            hits.append((predicted == label.index_select(0, candidates)).sum())
            if gradient is not None:
                probabilities.scatter_add_(1, label, probabilities.new_full(label.shape, -1))
                if not counted.all():
                    probabilities.mul_(counted)
                gradient[start : start + rows] = probabilities
        if gradient is not None:
            ctx.save_for_backward(gradient)
        correct = torch.stack(hits).sum()
        ctx.mark_non_differentiable(correct)
        return torch.stack(losses).sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (unit,) = ctx.saved_tensors
        return unit * float(gradient), None  # as a Python number it is not rounded to the type of the logits


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums -log softmax(logits)[label] over the rows, in float32, and counts the rows predicted right.

    Shapes (N rows, V classes):
        logits: (N, V), any floating type; its gradient has the same type.
        labels: (N,) int64, below V; a row with a negative label does not count.
        result: () float32 and () int64.
    """
    if logits.device.type == "cpu" and not torch.compiler.is_compiling() and logits.numel() > CHUNK:
        total, correct = _CrossEntropySum.apply(logits, labels)
        return total, correct
    ignored = labels.clamp(min=-1)
    total = F.cross_entropy(logits.float(), ignored, ignore_index=-1, reduction="sum")
    return total, (logits.detach().argmax(dim=-1) == labels).sum()
