"""AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101, algorithm 2) in the form BERT was trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tencentpretrain.config.train import OptimConfig
from tencentpretrain.registry import OPTIMIZERS

_LATE = 1.0e9
"""A step number so late that both bias corrections are exactly 1 in any number format."""


@OPTIMIZERS.register("adamw")
class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, by default without bias correction.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  p <- p - lr m / (sqrt(v) + eps);  p <- p - lr wd p.

    Two departures from algorithm 2, both as in BERT's published training: the moments are not corrected for their zero
    start unless `adam_bias_correction` is set, and the decay acts on the updated parameter.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimConfig) -> None:
        defaults = {
            "lr": config.learning_rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_eps,
            "weight_decay": 0.0,
            "bias_correction": config.adam_bias_correction,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("this optimizer takes no closure")
        for group in self.param_groups:
            for parameters in _by_kind(group["params"]).values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        firsts: list[Tensor] = []
        seconds: list[Tensor] = []
        steps: list[Tensor] = []
        numbers: dict[float, Tensor] = {}
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            firsts.append(state["exp_avg"])
            seconds.append(state["exp_avg_sq"])
            number = float(state["step"]) if group["bias_correction"] else _LATE
            if number not in numbers:
                numbers[number] = torch.tensor(number, dtype=torch.float32, device=parameter.device)
            steps.append(numbers[number])
        lr, decay, eps = float(group["lr"]), float(group["weight_decay"]), float(group["eps"])
        beta1, beta2 = group["betas"]
        # The kernel computes p (1 - lr' wd') - lr' u. With lr' = lr (1 - lr wd) and lr' wd' = lr wd that is
        # (p - lr u)(1 - lr wd): decay of the updated parameter, in the same single pass over memory.
        kept = 1.0 - lr * decay
        kernel_lr = lr * kept
        kernel_decay = lr * decay / kernel_lr if kernel_lr else 0.0
        torch._fused_adamw_(
            parameters,
            gradients,
            firsts,
            seconds,
            [],
            steps,
            lr=kernel_lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=kernel_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )


def _by_kind(parameters: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """Groups the parameters that have gradients by where and how they are stored: one kernel call for each."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return kinds
