"""One replica of the model per process: each reads its share of the batch, gradients are summed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tencentpretrain.config.train import PrecisionConfig
from tencentpretrain.engines.base import Losses, MicroStep
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.engines.processes import Group
from tencentpretrain.engines.reducer import GradientReducer


class ReplicaEngine(LocalEngine):
    """Data parallelism (Li et al. 2020, arXiv:2006.15704): whole weights and optimizer on every process.

    The loss is divided by the labels of all processes before the backward pass, so gradients are summed, not averaged.
    """

    def __init__(self, config: PrecisionConfig, group: Group) -> None:
        super().__init__(config)
        self.group = group
        self.rank = self.data_rank = group.rank
        self.world_size = self.data_size = group.size
        self._reducer: GradientReducer | None = None

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        optimizer = super().prepare(model, make_optimizer)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._reducer = GradientReducer(trained, self.group)
        return optimizer

    def accumulate(self, model: nn.Module, steps: Sequence[MicroStep]) -> Losses:
        assert self._reducer is not None
        losses = list(super().accumulate(model, steps[:-1]))
        self._reducer.arm()
        return [*losses, *super().accumulate(model, steps[-1:])]

    def reduce_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        assert self._reducer is not None
        self._reducer.finish()

    def sum_numbers(self, numbers: Tensor) -> Tensor:
        return self.group.sum_on_host(numbers)

    def any_rank(self, flag: bool) -> bool:
        return self.group.any(flag)
