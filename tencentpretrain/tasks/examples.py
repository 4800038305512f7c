"""Tokenised task data: arrays, not lists, and batches that are only as wide as their longest row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tencentpretrain.data.batch import Batch
from tencentpretrain.tokenizers.base import Tokenizer

Indices = NDArray[np.int64]

BUCKET_POOL = 50
"""Batches over which rows are sorted by length: enough for little padding, few enough to leave room for chance."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """All rows of one file, tokenised once.

    Shapes (N rows, total tokens):
        token_ids: (total,) the rows one after the other, with special tokens, already cut.
        offsets: (N + 1,) where each row begins.
        first_lengths: (N,) how many tokens of a row are segment 1; the rest is segment 2.
        labels: by name, (N, ...); copied row by row into `Batch.labels`.
    """

    token_ids: NDArray[np.uint32]
    offsets: Indices
    first_lengths: Indices
    labels: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.first_lengths)

    @property
    def lengths(self) -> Indices:
        """(N,) tokens per row."""
        return np.diff(self.offsets)

    def batch(self, rows: Indices, *, pad_id: int, width: int | None = None) -> Batch:
        """Puts rows into a batch, in the given order.

        Args:
            width: positions per row; the longest row's length if not given.
        """
        lengths = self.lengths[rows]
        width = width or int(lengths.max(initial=1))
        position = np.arange(width)[None, :]
        real = position < lengths[:, None]
        source = np.minimum(self.offsets[rows][:, None] + position, max(0, len(self.token_ids) - 1))
        token_ids = np.where(real, self.token_ids[source].astype(np.int64), pad_id)
        segment_ids = np.where(real, np.where(position < self.first_lengths[rows][:, None], 1, 2), 0)
        return Batch(
            token_ids=torch.from_numpy(token_ids),
            segment_ids=torch.from_numpy(segment_ids.astype(np.int64)),
            labels={name: torch.from_numpy(values[rows]) for name, values in self.labels.items()},
            token_count=int(lengths.sum()),
            has_padding=bool((lengths < width).any()),
        )


def encode_texts(
    first: Sequence[str],
    second: Sequence[str] | None,
    tokenizer: Tokenizer,
    seq_length: int,
    labels: Mapping[str, NDArray[Any]] | None = None,
) -> Examples:
    """Tokenises texts (CLS a SEP) or pairs (CLS a SEP b SEP) and cuts each row on the right to `seq_length`."""
    first_ids, first_offsets = tokenizer.encode_packed(first)
    lengths = np.diff(first_offsets) + 2
    first_lengths = np.minimum(lengths, seq_length)
    if second is not None:
        second_ids, second_offsets = tokenizer.encode_packed(second)
        lengths = lengths + np.diff(second_offsets) + 1
    lengths = np.minimum(lengths, seq_length)
    offsets = np.zeros(len(first) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    token_ids = np.empty(int(offsets[-1]), np.uint32)
    cls, sep = np.array([tokenizer.cls_id], np.uint32), np.array([tokenizer.sep_id], np.uint32)
    for row in range(len(first)):
        parts = [cls, first_ids[first_offsets[row] : first_offsets[row + 1]], sep]
        if second is not None:
            parts += [second_ids[second_offsets[row] : second_offsets[row + 1]], sep]
        token_ids[offsets[row] : offsets[row + 1]] = np.concatenate(parts)[: lengths[row]]
    return Examples(token_ids=token_ids, offsets=offsets, first_lengths=first_lengths, labels=labels or {})


def shuffled_batches(num_rows: int, batch_size: int, *, seed: int, epoch: int) -> Iterator[Indices]:
    """Yields the rows of each batch of one epoch; the order depends on seed and epoch alone."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)
    for begin in range(0, num_rows, batch_size):
        yield order[begin : begin + batch_size]


def bucketed_batches(lengths: Indices, batch_size: int, *, seed: int, epoch: int) -> Iterator[Indices]:
    """Yields the rows of each batch of one epoch, rows of like length together.

    The order depends on the lengths, seed and epoch alone. The shuffled rows are sorted by length within pools of
    `BUCKET_POOL` batches, so neighbours still change from epoch to epoch; then the batches are shuffled. The one that
    is not full stays last.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = generator.permutation(len(lengths))
    for begin in range(0, len(order), pool := BUCKET_POOL * batch_size):
        rows = order[begin : begin + pool]
        order[begin : begin + pool] = rows[np.argsort(-lengths[rows], kind="stable")]
    full = len(order) // batch_size
    for batch in generator.permutation(full):
        yield order[batch * batch_size : (batch + 1) * batch_size]
    if full * batch_size < len(order):
        yield order[full * batch_size :]


def batches_by_length(lengths: Indices, batch_size: int) -> Iterator[Indices]:
    """Yields all rows, longest first, so that batches hold little padding; for passes whose order does not matter."""
    order = np.argsort(-lengths, kind="stable")
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]
