"""Where a step runs: the boundary behind which one process, several, or sharded weights and optimizers differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from tencentpretrain.checkpoint.layout import Layout
from tencentpretrain.data.batch import Batch
from tencentpretrain.model import Model
from tencentpretrain.targets.base import LossSum, LossValue


@dataclass(frozen=True, kw_only=True)
class MicroStep:
    """One batch of an update.

    Fields:
        batch: on the host; this data rank's part of the global batch.
        divisor: by loss, what its sum is divided by: the count over the whole update and all processes.
        seed: of dropout.
    """

    batch: Batch
    divisor: Mapping[str, float]
    seed: int


Losses = Sequence[Mapping[str, LossSum]]
"""By micro-step and name."""

Values = Sequence[Mapping[str, LossValue]]
"""Losses on the host, summed over all processes."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What an update did.

    Fields:
        values: the losses it was made for.
        gradient_norm: global L2 norm before clipping.
        applied: False if it was skipped because the loss scale was too large.
    """

    values: Values
    gradient_norm: float
    applied: bool


class Engine(Protocol):
    """What training asks of the machine. Nothing outside `engines` asks which engine it is.

    A method marked collective is called by all processes together, in the same order.

    Attributes:
        device: of this process.
        rank, world_size: of all processes.
        data_rank, data_size: which share of each global batch this process reads. Processes that hold parts of one
            replica (tensor and pipeline parallel) read the same.
        layout: which part of the model's tensors this process holds.
    """

    device: torch.device
    rank: int
    world_size: int
    data_rank: int
    data_size: int
    layout: Layout

    def construct(self, make: Callable[[], Model]) -> Model:
        """Returns the model that `make` builds, cut as `layout` says."""
        ...

    def prepare(self, model: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> Any:
        """Places a model whose weights are loaded for training and returns its optimizer. Collective."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the number format of forward passes."""
        ...

    def accumulate(self, model: nn.Module, steps: Sequence[MicroStep]) -> Losses:
        """Runs forward and backward passes of an update and returns this process's losses, detached. Collective."""
        ...

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        losses: Losses,
        *,
        max_norm: float | None,
        inspect: Callable[[Values], None] = lambda values: None,
    ) -> Update:
        """Sums losses and gradients over all processes, clips, updates the weights and drops the gradients. Collective.

        Args:
            inspect: sees the losses before anything is changed; what it raises ends the update.

        Raises:
            NonFiniteGradientError: the gradient is not finite and no loss scale explains it; the weights are untouched.
        """
        ...

    def sum_over_ranks(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Returns the sums over all data ranks. Collective."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Returns whether the flag is set on any process. Collective."""
        ...

    def snapshot(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
        """Returns copies, on the CPU, of the whole tensors that this process is to save. Collective.

        Over all processes each tensor is there once. The copies do not change when training goes on.
        """
        ...

    def restore_optimizer(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
        """Gives the optimizer the saved state, whatever layout it was saved at. Collective.

        Raises:
            CheckpointMismatch: it is the state of other parameters.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Returns what else has to be saved of the engine, as plain JSON; equal on all processes."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up a saved state."""
        ...


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one process saves: whole tensors by published name, and the optimizer's by "<parameter>/<what>"."""

    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
