"""Losses on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tencentpretrain.targets.base import LossSum, LossValue


def detached(losses: Mapping[str, LossSum]) -> dict[str, LossSum]:
    """Returns losses without their graph."""
    return {
        name: LossSum(total=loss.total.detach(), count=loss.count, correct=loss.correct)
        for name, loss in losses.items()
    }


def read(losses: Sequence[Mapping[str, LossSum]], norm: Tensor) -> tuple[Tensor, float]:
    """Reads all numbers of an update from the device at once.

    Returns:
        (losses, 3) float64 on the CPU: sum, count and right predictions of each loss of each micro-step, in order
        (counts below 2^53 are exact), and the norm.
    """
    rows = [norm.detach()]
    for loss in (loss for step in losses for loss in step.values()):
        rows += [loss.total, loss.count, torch.zeros_like(loss.count) if loss.correct is None else loss.correct]
    numbers = torch.stack([value.double() for value in rows]).cpu()
    return numbers[1:].view(-1, 3), float(numbers[0])


def values_of(numbers: Tensor, like: Sequence[Mapping[str, LossSum]]) -> list[dict[str, LossValue]]:
    """Returns numbers as `read` gave them, named as the losses they came from."""
    rows = iter(numbers.tolist())

    def value(loss: LossSum) -> LossValue:
        total, count, correct = next(rows)
        return LossValue(total=total, count=int(count), correct=None if loss.correct is None else int(correct))

    return [{name: value(loss) for name, loss in step.items()} for step in like]
