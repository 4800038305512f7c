"""An optimizer and its schedule from a configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tencentpretrain.config.train import OptimConfig
from tencentpretrain.optim.param_groups import OLD_PRETRAIN_NAMES, param_groups
from tencentpretrain.optim.schedules import Course
from tencentpretrain.registry import OPTIMIZERS, SCHEDULES


def build_optimizer(
    model: nn.Module, config: OptimConfig, undecayed_names: tuple[str, ...] = OLD_PRETRAIN_NAMES
) -> torch.optim.Optimizer:
    """Returns the configured optimizer over the model's trainable parameters; tied ones enter once."""
    groups = param_groups(model.named_parameters(), config, undecayed_names)
    optimizer: torch.optim.Optimizer = OPTIMIZERS.get(config.optimizer)(groups, config)
    return optimizer


def build_schedule(config: OptimConfig, total_updates: int) -> Callable[[int], float]:
    """Returns the learning rate as a function of the number of updates already made."""
    multiplier = SCHEDULES.get(config.scheduler)
    course = Course(
        total=total_updates,
        warmup=total_updates * config.warmup,
        decay=total_updates * config.lr_decay,
        learning_rate=config.learning_rate,
    )

    def learning_rate(update: int) -> float:
        return config.learning_rate * float(multiplier(update, course))

    return learning_rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
