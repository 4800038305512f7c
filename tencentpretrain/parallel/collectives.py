"""Sums over a tensor group inside the graph (Shoeybi et al. 2019, arXiv:1909.08053, section 3, functions f and g)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tencentpretrain.parallel.group import Group


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(gradient), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def enter(x: Tensor, group: Group) -> Tensor:
    """Returns x, which is equal on all processes and from here on feeds a different slice of a layer on each.

    In the backward pass the slices' gradients are summed.
    """
    entered: Tensor = _Enter.apply(x, group)
    return entered


def leave(x: Tensor, group: Group) -> Tensor:
    """Returns the sum of what the processes hold; in the backward pass each gets the whole gradient."""
    left: Tensor = _Leave.apply(x, group)
    return left
