"""What a target returns, and the base of all targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tencentpretrain.data.batch import Batch, Stream


@dataclass(frozen=True, kw_only=True)
class LossSum:
    """One loss before its division: a sum over positions and how many they are.

    The step divides by the count summed over all micro-batches and processes, so a loss does not depend on how the
    batch was cut.

    Shapes:
        total: () the sum, which carries the gradient.
        count: () int64, how many positions (or samples) were summed.
        correct: () int64, how many of them were predicted right; None where that has no meaning.
    """

    total: Tensor
    count: Tensor
    correct: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """The sum over the count; 0 where nothing was counted."""
        return self.total / self.count.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class LossValue:
    """A `LossSum` on the host."""

    total: float
    count: int
    correct: int | None

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """All losses of one forward pass, by name ("mlm", "sp", "lm", "cls", "clr", "bilm_forward", "bilm_backward")."""

    losses: Mapping[str, LossSum] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """The sum of the mean losses: what training minimises when this is the whole batch."""
        return torch.stack([loss.mean for loss in self.losses.values()]).sum()


class Target(nn.Module, ABC):
    """A head with its loss.

    A subclass is built as `cls(config, vocab_size, pad_id=...)` and maps hidden states to named losses.

    Attributes:
        fused_loss: large vocabularies are projected inside the loss, which reads the head's weight without running the
            head. False where the weight is only whole while the head runs (sharded parameters).
    """

    fused_loss: bool = True

    @abstractmethod
    def forward(self, hidden: Stream, batch: Batch, segment_ids: Stream) -> dict[str, LossSum]:
        """Returns the losses.

        Args:
            hidden: (B, S, H) output of the decoder if there is one, else of the encoder; a pair for dual models.
            batch: where the labels are.
            segment_ids: (B, S), of the stream that `hidden` describes.
        """
