"""Where a step runs: the boundary behind which one process, several, or a sharded optimizer differ."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """What the training loop asks of the machine. Nothing outside `engines` asks which engine it is."""

    device: torch.device
    rank: int
    world_size: int

    def prepare(self, model: nn.Module) -> nn.Module:
        """Returns the model placed where it will be trained, and compiled if that was asked for."""
        ...

    def seed(self, seed: int) -> None:
        """Starts the random numbers of dropout anew."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the number format of forward passes."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss."""
        ...

    def sum_over_ranks(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Returns the sums of whole numbers over all processes."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Returns whether the flag is set on any process."""
        ...

    def gradient_norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Returns the global L2 norm () of the whole gradient in its true scale, without waiting for the device."""
        ...

    def update(self, optimizer: torch.optim.Optimizer, *, gradient_norm: float, max_norm: float | None) -> bool:
        """Clips, updates the weights and drops the gradients.

        Returns:
            False if the gradient was infinite because the loss scale was too large: nothing was updated, the scale is
            smaller now.

        Raises:
            NonFiniteError: the gradient is not finite and no loss scale explains it; the weights are untouched.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Returns what has to be saved of the engine, as plain JSON."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up a saved state."""
        ...
