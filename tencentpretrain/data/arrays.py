"""Padded batches as NumPy arrays; workers make them without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tencentpretrain.data.examples import (
    Ids,
    LabelledExample,
    MaskedExample,
    PairExample,
    PrefixExample,
    WindowExample,
)

if TYPE_CHECKING:
    from tencentpretrain.data.batch import Batch

IntArray = NDArray[np.int64]
IGNORE = -100
"""`IGNORE_LABEL` of data/batch.py, which cannot be imported here without torch; a test compares them."""


@dataclass(frozen=True, kw_only=True)
class BatchArrays:
    """The fields of `Batch` as int64 arrays; shapes as there."""

    token_ids: IntArray
    segment_ids: IntArray
    labels: dict[str, IntArray] = field(default_factory=dict)
    decoder_token_ids: IntArray | None = None
    decoder_segment_ids: IntArray | None = None
    document_ids: IntArray | None = None

    def to_batch(self) -> Batch:
        """Returns the same values as tensors, which share their memory."""
        import torch

        from tencentpretrain.data.batch import Batch

        def tensor(array: IntArray) -> torch.Tensor:
            return torch.from_numpy(array)

        real = int(np.count_nonzero(self.segment_ids))
        decoder_real = 0 if self.decoder_segment_ids is None else int(np.count_nonzero(self.decoder_segment_ids))
        return Batch(
            token_ids=tensor(self.token_ids),
            segment_ids=tensor(self.segment_ids),
            labels={name: tensor(label) for name, label in self.labels.items()},
            decoder_token_ids=None if self.decoder_token_ids is None else tensor(self.decoder_token_ids),
            decoder_segment_ids=None if self.decoder_segment_ids is None else tensor(self.decoder_segment_ids),
            document_ids=None if self.document_ids is None else tensor(self.document_ids),
            token_count=real + decoder_real,
            has_padding=real < self.segment_ids.size,
        )


def pad_rows(rows: Sequence[Ids], width: int, fill: int) -> IntArray:
    """Returns rows of any length as (rows, width), cut or filled on the right."""
    padded = np.full((len(rows), width), fill, np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row[:width]
    return padded


def segments(ends: Sequence[Sequence[int]], width: int) -> IntArray:
    """Returns segment ids (rows, width): 1 up to the first end of a row, 2 up to its second, then 0."""
    segment_ids = np.zeros((len(ends), width), np.int64)
    for row, row_ends in zip(segment_ids, ends, strict=True):
        begin = 0
        for number, end in enumerate(row_ends, start=1):
            row[begin:end] = number
            begin = end
    return segment_ids


def documents(lengths: Sequence[tuple[int, ...]], width: int) -> IntArray | None:
    """Returns document ids (rows, width): 1, 2, ... from left to right, 0 at padding; None where none were noted."""
    if not any(lengths):
        return None
    document_ids = np.zeros((len(lengths), width), np.int64)
    for row, row_lengths in zip(document_ids, lengths, strict=True):
        numbered = np.repeat(np.arange(1, len(row_lengths) + 1), row_lengths)
        row[: len(numbered)] = numbered[:width]
    return document_ids


def scalars(values: Sequence[int | None]) -> IntArray:
    """Returns labels of whole samples as (rows,)."""
    return np.array(values, np.int64)


def masked_arrays(
    examples: Sequence[MaskedExample], *, seq_length: int, pad_id: int, label_name: str | None
) -> BatchArrays:
    """Batches masked samples; `label_name` is the name of the labels of whole samples."""
    mlm = np.zeros((len(examples), seq_length), np.int64)
    for row, example in zip(mlm, examples, strict=True):
        row[example.positions] = example.labels
    labels = {"mlm": mlm}
    if label_name is not None:
        labels[label_name] = scalars([example.label for example in examples])
    return BatchArrays(
        token_ids=pad_rows([example.token_ids for example in examples], seq_length, pad_id),
        segment_ids=segments([example.segment_ends for example in examples], seq_length),
        labels=labels,
        document_ids=documents([example.document_lengths for example in examples], seq_length),
    )


def causal_arrays(
    examples: Sequence[WindowExample], *, seq_length: int, pad_id: int, loss_on_final_pad: bool
) -> BatchArrays:
    """Batches windows of seq_length + 1 tokens for next-token prediction.

    A shorter window ends a document. Its last token has nothing to predict: the label is ignored, or with
    `loss_on_final_pad` the padding. Where documents must not see each other, no document predicts the next one's start.
    """
    ids = pad_rows([example.token_ids for example in examples], seq_length + 1, pad_id)
    labels = ids[:, 1:].copy()
    lengths = [min(len(example.token_ids), seq_length) for example in examples]
    if not loss_on_final_pad:
        for row, example in zip(labels, examples, strict=True):
            if len(example.token_ids) <= seq_length:
                row[len(example.token_ids) - 1] = IGNORE
    for row, example in zip(labels, examples, strict=True):
        row[np.cumsum(example.document_lengths[:-1], dtype=np.int64) - 1] = IGNORE
    return BatchArrays(
        token_ids=ids[:, :-1].copy(),
        segment_ids=segments([(length,) for length in lengths], seq_length),
        labels={"lm": labels},
        document_ids=documents([example.document_lengths for example in examples], seq_length),
    )


def bidirectional_arrays(
    examples: Sequence[WindowExample], *, seq_length: int, pad_id: int, cls_id: int, sep_id: int
) -> BatchArrays:
    """Batches windows for a forward and a backward language model; the window stands between CLS and SEP."""
    rows = [example.token_ids for example in examples]
    return BatchArrays(
        token_ids=pad_rows(rows, seq_length, pad_id),
        segment_ids=segments([(len(row),) for row in rows], seq_length),
        labels={
            "bilm_forward": pad_rows([np.append(row[1:], sep_id) for row in rows], seq_length, pad_id),
            "bilm_backward": pad_rows([np.append(cls_id, row[:-1]) for row in rows], seq_length, pad_id),
        },
    )


def prompt_arrays(examples: Sequence[PrefixExample], *, seq_length: int, pad_id: int) -> BatchArrays:
    """Batches instructions: segment 2 marks the positions that predict the answer; rows are seq_length - 1 long."""
    ids = pad_rows([example.token_ids for example in examples], seq_length, pad_id)
    ends = [(example.prefix_length - 1, len(example.token_ids) - 1) for example in examples]
    return BatchArrays(
        token_ids=ids[:, :-1].copy(), segment_ids=segments(ends, seq_length - 1), labels={"lm": ids[:, 1:].copy()}
    )


def prefix_arrays(examples: Sequence[PrefixExample], *, seq_length: int, pad_id: int) -> BatchArrays:
    """Batches prefix and continuation: labels stand only where the next token belongs to the continuation."""
    rows = [example.token_ids for example in examples]
    labels = np.full((len(examples), seq_length), IGNORE, np.int64)
    for label, example in zip(labels, examples, strict=True):
        first, last = example.prefix_length - 1, min(len(example.token_ids) - 1, seq_length)
        label[first:last] = example.token_ids[first + 1 : last + 1]
    return BatchArrays(
        token_ids=pad_rows(rows, seq_length, pad_id),
        segment_ids=segments(
            [(example.prefix_length, min(len(example.token_ids), seq_length)) for example in examples], seq_length
        ),
        labels={"lm": labels},
    )


def translation_arrays(
    examples: Sequence[PairExample],
    *,
    seq_length: int,
    tgt_length: int,
    pad_id: int,
    tgt_pad_id: int,
    loss_on_final_pad: bool,
) -> BatchArrays:
    """Batches sources and targets for teacher forcing; a target has up to tgt_length + 1 tokens.

    The decoder reads the target without its last token and predicts it without its first. Where a target is shorter,
    its last token is read too and has nothing to predict: ignored, or with `loss_on_final_pad` the padding.
    """
    sources = [example.source_ids for example in examples]
    targets = pad_rows([example.target_ids for example in examples], tgt_length + 1, tgt_pad_id)
    lengths = [min(len(example.target_ids), tgt_length) for example in examples]
    labels = targets[:, 1:].copy()
    if not loss_on_final_pad:
        for row, example in zip(labels, examples, strict=True):
            if len(example.target_ids) <= tgt_length:
                row[len(example.target_ids) - 1] = IGNORE
    return BatchArrays(
        token_ids=pad_rows(sources, seq_length, pad_id),
        segment_ids=segments([(min(len(source), seq_length),) for source in sources], seq_length),
        labels={"lm": labels},
        decoder_token_ids=targets[:, :-1].copy(),
        decoder_segment_ids=segments([(length,) for length in lengths], tgt_length),
    )


def labelled_arrays(examples: Sequence[LabelledExample], *, seq_length: int, pad_id: int) -> BatchArrays:
    """Batches texts with a class."""
    ends = [np.cumsum(example.lengths).tolist() for example in examples]
    return BatchArrays(
        token_ids=pad_rows([example.token_ids for example in examples], seq_length, pad_id),
        segment_ids=segments(ends, seq_length),
        labels={"cls": scalars([example.label for example in examples])},
    )


def flat(*parts: Ids | list[int]) -> Ids:
    """Joins arrays and lists of ids to one int64 array."""
    joined: NDArray[Any] = np.concatenate([np.asarray(part, np.int64) for part in parts])
    return joined
