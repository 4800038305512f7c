"""Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235) with an external learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tencentpretrain.config.train import OptimConfig
from tencentpretrain.registry import OPTIMIZERS

_EPS = 1e-30
_CLIP_THRESHOLD = 1.0
_DECAY_EXPONENT = -0.8


@OPTIMIZERS.register("adafactor")
class Adafactor(torch.optim.Optimizer):
    """Adam's second moment kept as one row and one column mean per matrix, and no first moment.

    Algorithms 4 and 5 of the paper with decay 1 - t^-0.8 and clipping at root mean square 1, without the parameter
    scale: the learning rate is the schedule's alone. Tensors with more than two dimensions are stacks of matrices over
    their last two. The weight decay acts on the parameter before the update.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, {"lr": config.learning_rate, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("this optimizer takes no closure")
        for group in self.param_groups:
            lr, decay = float(group["lr"]), float(group["weight_decay"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = self._direction(parameter)
                root_mean_square = update.square().mean().sqrt()
                update.mul_(lr / (root_mean_square / _CLIP_THRESHOLD).clamp(min=1.0))
                if decay:
                    parameter.mul_(1.0 - lr * decay)
                parameter.sub_(update)

    def _direction(self, parameter: Tensor) -> Tensor:
        """Advances the second moments and returns g / sqrt(v), not yet clipped."""
        gradient = parameter.grad
        assert gradient is not None
        gradient = gradient.float()
        state = self.state[parameter]
        factored = gradient.dim() >= 2
        if not state:
            state["step"] = 0
            if factored:
                state["row"] = gradient.new_zeros(gradient.shape[:-1])
                state["column"] = gradient.new_zeros((*gradient.shape[:-2], gradient.shape[-1]))
            else:
                state["exp_avg_sq"] = torch.zeros_like(gradient)
        state["step"] += 1
        weight = float(state["step"]) ** _DECAY_EXPONENT  # 1 - beta2 of this step
        square = gradient.square().add_(_EPS)
        if not factored:
            moment: Tensor = state["exp_avg_sq"]
            moment.lerp_(square, weight)
            return moment.rsqrt().mul_(gradient)
        row: Tensor = state["row"]
        column: Tensor = state["column"]
        row.lerp_(square.mean(dim=-1), weight)
        column.lerp_(square.mean(dim=-2), weight)
        row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        column_factor = column.rsqrt().unsqueeze(-2)
        return gradient * row_factor * column_factor
