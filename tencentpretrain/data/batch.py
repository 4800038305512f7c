"""What one step reads: a batch of samples as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Union

import torch
from torch import Tensor

Stream = Union[Tensor, "tuple[Tensor, Tensor]"]
"""One tensor, or a pair of them for a two-stream (dual) model."""

IGNORE_LABEL = -100
"""A label at a position that must not enter any loss, whatever its segment."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one step, ready for a model.

    Shapes (B batch, S source length, T target length):
        token_ids: (B, S) int64, or float features for image and audio; a pair for dual models.
        segment_ids: (B, S) int64: 0 padding, 1 first segment, 2 second segment; a pair for dual models.
        labels: by label name ("mlm", "sp", "lm", "cls", "bilm_forward", "bilm_backward"): (B, S), (B, T) or (B,) int64.
        decoder_token_ids, decoder_segment_ids: (B, T) int64, for models with a decoder.
        token_count: real (not padding) source and target tokens, counted on the host when the batch was made.
        document_ids: (B, S) int64, where a row holds several documents that must not see each other: 1, 2, ... for the
            documents of a row from left to right, 0 at padding. None: a row is one document.
        has_padding: whether any source position is padding; False lets attention drop its mask without a device sync.
    """

    token_ids: Stream
    segment_ids: Stream
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    decoder_token_ids: Tensor | None = None
    decoder_segment_ids: Tensor | None = None
    document_ids: Tensor | None = None
    token_count: int = 0
    has_padding: bool = True

    @property
    def size(self) -> int:
        """The number of samples B."""
        first = self.token_ids[0] if isinstance(self.token_ids, tuple) else self.token_ids
        return int(first.size(0))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Returns the same batch with every tensor on `device`."""

        def move(stream: Stream) -> Stream:
            if isinstance(stream, tuple):
                return stream[0].to(device, non_blocking=non_blocking), stream[1].to(device, non_blocking=non_blocking)
            return stream.to(device, non_blocking=non_blocking)

        def move_optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            token_ids=move(self.token_ids),
            segment_ids=move(self.segment_ids),
            labels={name: label.to(device, non_blocking=non_blocking) for name, label in self.labels.items()},
            decoder_token_ids=move_optional(self.decoder_token_ids),
            decoder_segment_ids=move_optional(self.decoder_segment_ids),
            document_ids=move_optional(self.document_ids),
        )
