"""Cross-entropy over a large vocabulary, summed, without a float32 copy of all logits, or without the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tencentpretrain.layers.norm import output_dtype

CHUNK = 1 << 20
"""Logits that are widened to float32 at a time: few enough to stay in a core's cache."""

PROJECTED = 1 << 25
"""Logits that exist at a time where the projection is part of the loss: 128 MB in float32."""

FUSED_FROM = 1 << 26
"""From this many logits on the projection becomes part of the loss: 256 MB of logits in float32."""


def _add_piece(logits: Tensor, labels: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns summed loss and hits of some rows; writes softmax - onehot to `gradient`, which may be `logits`."""
    label = labels[:, None]
    counted = label >= 0
    label = label.clamp(min=0)
    wide = logits.float()
    maximum = wide.amax(dim=1, keepdim=True)
    chosen = wide.gather(1, label)
    probabilities = torch.softmax(wide, dim=1)
    # The largest probability is exp(0) over the sum, so its logarithm gives the sum's without another pass.
    log_sum = probabilities.amax(dim=1, keepdim=True).log().neg()
    loss = ((log_sum + (maximum - chosen)) * counted).sum()
    if logits.device.type == "cpu":
        candidates = ((chosen == maximum) & counted).squeeze(1).nonzero().squeeze(1)
        predicted = wide.index_select(0, candidates).argmax(dim=1, keepdim=True)  # the first of equal maxima
        hits = (predicted == label.index_select(0, candidates)).sum()
    else:  # no wait for the device
        hits = ((wide.argmax(dim=1, keepdim=True) == label) & counted).sum()
    if gradient is not None:
        probabilities.scatter_add_(1, label, probabilities.new_full(label.shape, -1))
        if logits.device.type != "cpu" or not counted.all():
            probabilities.mul_(counted)
        gradient.copy_(probabilities)
    return loss, hits


def _add_pieces(logits: Tensor, labels: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `_add_piece`, a few rows at a time on the CPU."""
    rows = max(1, CHUNK // logits.size(1)) if logits.device.type == "cpu" else max(1, len(labels))
    losses, hits = [], []
    for start in range(0, max(1, len(labels)), rows):
        piece = slice(start, start + rows)
        loss, hit = _add_piece(logits[piece], labels[piece], None if gradient is None else gradient[piece])
        losses.append(loss)
        hits.append(hit)
    return torch.stack(losses).sum(), torch.stack(hits).sum()


class _CrossEntropySum(torch.autograd.Function):
    """Computes the gradient while the probabilities are at hand, and keeps it in the type of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total, correct = _add_pieces(logits, labels, gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return total, correct

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


@dataclass(kw_only=True)
class _Projected:
    """What one pass over all rows found; gradients only for what needs one."""

    total: Tensor
    correct: Tensor
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


def _project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, needed: tuple[bool, ...], factor: Tensor | None
) -> _Projected:
    """Projects some rows at a time, and at once makes the gradients of the loss times `factor` (1 if None).

    The weight's gradient is summed in the weight's own type, whatever type the products are computed in.
    """
    dtype = hidden.dtype
    cast = weight.to(dtype)
    cast_bias = None if bias is None else bias.to(dtype)
    grad_hidden = torch.empty_like(hidden) if needed[0] else None
    grad_weight = torch.zeros_like(weight) if needed[1] else None
    grad_bias = torch.zeros_like(bias) if bias is not None and needed[2] else None
    rows = max(1, PROJECTED // weight.size(0))
    totals, hits = [], []
    for start in range(0, max(1, len(labels)), rows):
        piece = slice(start, start + rows)
        logits = F.linear(hidden[piece], cast, cast_bias)
        total, correct = _add_pieces(logits, labels[piece], logits if any(needed) else None)
        totals.append(total)
        hits.append(correct)
        if factor is not None:
            logits.mul_(factor)
        if grad_hidden is not None:
            torch.mm(logits, cast, out=grad_hidden[piece])
        if grad_weight is not None and grad_weight.dtype == dtype:
            grad_weight.addmm_(logits.t(), hidden[piece])
        elif grad_weight is not None:
            grad_weight += logits.t() @ hidden[piece]
        if grad_bias is not None:
            grad_bias += logits.sum(dim=0)
    gradients = grad_hidden, grad_weight, grad_bias
    return _Projected(total=torch.stack(totals).sum(), correct=torch.stack(hits).sum(), gradients=gradients)


class _LinearCrossEntropySum(torch.autograd.Function):
    """Makes the gradients in the forward pass, where the logits are, and multiplies them in the backward pass.

    In float16 they would lose their small elements, because the loss scale is not known yet: there the backward pass
    projects again. It also does when it runs a second time, since the gradients are given away, not copied.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[:3]
        later = hidden.dtype == torch.float16
        found = _project(hidden, weight, bias, labels, (False,) * 3 if later else needed, None)
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.gradients = None if later else found.gradients
        ctx.mark_non_differentiable(found.correct)
        return found.total, found.correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.gradients = ctx.gradients, None
        if found is None:
            hidden, weight, bias, labels = ctx.saved_tensors
            return *_project(hidden, weight, bias, labels, ctx.needs_input_grad[:3], gradient).gradients, None
        factor = float(gradient) if gradient.device.type == "cpu" else gradient
        return *(None if unit is None else unit.mul_(factor) for unit in found), None


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns `cross_entropy_sum` of hidden weight^T + bias, of which only some rows exist at a time.

    Gradients are made in the forward pass (Hsu et al. 2024, arXiv:2410.10989, section 3.2). Under autocast the products
    are computed in its type, as a linear layer's are.

    Shapes (N rows, H width, V classes):
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        labels: (N,) int64, below V; a row with a negative label does not count.
        result: () float32 and () int64.
    """
    hidden = hidden.to(output_dtype(hidden))
    if not torch.is_grad_enabled():  # a function is told of inputs with gradients even then
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        total, correct = _LinearCrossEntropySum.apply(hidden, weight, bias, labels)
    return total, correct
