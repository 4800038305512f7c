"""The base of all encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from tencentpretrain.data.batch import Stream


class Encoder(nn.Module, ABC):
    """Maps embedded sequences to hidden states; built as `cls(config)`.

    Attributes:
        gradient_checkpointing: recompute layers in the backward pass instead of keeping their activations.
    """

    gradient_checkpointing: bool = False

    @abstractmethod
    def forward(self, emb: Stream, segment_ids: Stream, has_padding: bool = True) -> Stream:
        """Returns (B, S, H), a pair for dual encoders.

        Shapes:
            emb: (B, S, E); a pair for dual encoders.
            segment_ids: (B, S), 0 at padding; a pair for dual encoders.
            has_padding: False promises that no position is padding.
        """
