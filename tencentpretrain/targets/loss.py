"""Sums of cross-entropy that several targets share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tencentpretrain.data.batch import IGNORE_LABEL
from tencentpretrain.layers import cross_entropy
from tencentpretrain.targets.base import LossSum


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> LossSum:
    """Returns the summed negative log-likelihood of `labels`; IGNORE_LABEL does not count.

    Shapes:
        logits: (rows, classes).
        labels: (rows,) int64.
    """
    total, correct = cross_entropy.cross_entropy_sum(logits, labels)
    return LossSum(total=total, count=(labels != IGNORE_LABEL).sum(), correct=correct)


def projected_cross_entropy_sum(
    head: nn.Linear, hidden: Tensor, labels: Tensor, tap: nn.Module, *, fused: bool = True
) -> LossSum:
    """Returns `cross_entropy_sum` of the head's logits; of many, only some rows exist at a time.

    All logits exist where somebody looks at them (`tap`), where the head is more than a linear layer with its own
    weight (adapters, hooks, a part of the vocabulary), in compiled models, and with `fused` off.

    Shapes:
        hidden: (rows, width).
        labels: (rows,) int64.
    """
    many = len(labels) * head.out_features >= cross_entropy.FUSED_FROM
    if not (fused and many and _is_plain(head) and not _is_watched(tap)) or torch.compiler.is_compiling():
        return cross_entropy_sum(tap(head(hidden)), labels)
    total, correct = cross_entropy.linear_cross_entropy_sum(hidden, head.weight, head.bias, labels)
    return LossSum(total=total, count=(labels != IGNORE_LABEL).sum(), correct=correct)


def _is_plain(head: nn.Module) -> bool:
    """Tells whether a head's forward pass is nothing but its weight and bias, and these are here as a whole."""
    if type(head) is not nn.Linear or _is_watched(head) or is_parametrized(head):
        return False
    whole = head.weight.shape == (head.out_features, head.in_features)
    return whole and type(head.weight.detach()) is Tensor


def _is_watched(module: nn.Module) -> bool:
    """Tells whether hooks run before or after a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def smoothed_sum(logits: Tensor, labels: Tensor, *, smoothing: float, ignored_label: int | None = None) -> LossSum:
    """Returns the label-smoothed loss, with the share smoothing / (classes - 1) on each wrong class.

    Szegedy et al. 2016 (arXiv:1512.00567, section 7). Rows labelled `ignored_label` add nothing to the sum but are
    counted, as published models were trained; rows labelled IGNORE_LABEL are not counted.

    Shapes:
        logits: (rows, classes).
        labels: (rows,) int64.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    counted = labels != IGNORE_LABEL
    likelihood = -log_probabilities.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    spread = -log_probabilities.sum(dim=-1)
    each = smoothing / (logits.size(-1) - 1)
    loss = (1 - smoothing - each) * likelihood + each * spread
    kept = counted if ignored_label is None else counted & (labels != ignored_label)
    with torch.no_grad():
        correct = ((logits.argmax(dim=-1) == labels) & counted).sum()
    return LossSum(total=(loss * kept).sum(), count=counted.sum(), correct=correct)
