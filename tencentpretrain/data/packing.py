"""Several whole samples in one row, so that rows hold little padding; no sample sees another.

Rows are filled by best fit, longest samples first: each sample goes into the fullest row that still has room for it.
Which samples share a row depends on their lengths and their order in the data set alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.arrays import IGNORE, BatchArrays, IntArray
from tencentpretrain.data.processor import Plan, Processor
from tencentpretrain.data.store import IndexArray, Store
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.tokenizers.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PackedPlan(Plan):
    """Rows of samples.

    Attributes:
        samples: the plan of the samples themselves.
        order: (samples,) the samples, row after row.
        begins: (rows + 1,) where each row begins in `order`.
    """

    samples: Plan
    order: IndexArray
    begins: IndexArray

    def row(self, index: int) -> list[int]:
        """Returns the samples of one row."""
        found: list[int] = self.order[self.begins[index] : self.begins[index + 1]].tolist()
        return found


def pack(lengths: IndexArray, capacity: int) -> tuple[IndexArray, IndexArray]:
    """Distributes samples over rows by best fit, longest first.

    Args:
        lengths: (samples,) positions that each takes, at most `capacity`.
        capacity: positions of a row.

    Returns:
        the samples row after row (samples,), and where each row begins among them (rows + 1,).
    """
    row_of = np.zeros(len(lengths), np.int64)
    open_rows: defaultdict[int, list[int]] = defaultdict(list)  # by free positions
    free_sizes = 0  # bit n is set where open_rows[n] is not empty
    rows = 0
    longest_first = np.argsort(-lengths, kind="stable")
    for sample, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        fitting = free_sizes >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                free_sizes &= ~(1 << free)
        else:
            free, row = capacity, rows
            rows += 1
        row_of[sample] = row
        left = free - length
        if left:
            open_rows[left].append(row)
            free_sizes |= 1 << left
    begins = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows), out=begins[1:])
    return np.argsort(row_of, kind="stable"), begins


def join_rows(samples: BatchArrays, counts: Sequence[int], *, pad_id: int) -> BatchArrays:
    """Puts padded samples one after the other into rows of the same width.

    Args:
        samples: one sample per row, padded on the right.
        counts: how many of them each new row takes, in order.
    """
    width = samples.token_ids.shape[1]
    lengths = np.count_nonzero(samples.segment_ids, axis=1).tolist()

    def joined(values: IntArray, fill: int) -> IntArray:
        rows = np.full((len(counts), width), fill, np.int64)
        sample = 0
        for row, count in zip(rows, counts, strict=True):
            begin = 0
            for number in range(sample, sample + count):
                row[begin : begin + lengths[number]] = values[number, : lengths[number]]
                begin += lengths[number]
            sample += count
        return rows

    numbers = np.concatenate([np.arange(1, count + 1) for count in counts])
    return BatchArrays(
        token_ids=joined(samples.token_ids, pad_id),
        segment_ids=joined(samples.segment_ids, 0),
        labels={name: joined(values, IGNORE) for name, values in samples.labels.items()},
        document_ids=joined(np.broadcast_to(numbers[:, None], samples.token_ids.shape), 0),
    )


class PackingProcessor(Processor[PackedPlan, tuple[Any, ...]]):
    """Another processor's samples, several in a row."""

    def __init__(self, samples: Processor[Any, Any], tokenizer: Tokenizer, tgt_tokenizer: Tokenizer | None) -> None:
        super().__init__(samples.data, tokenizer, tgt_tokenizer)
        self.samples = samples
        # What a class says about itself, this object says about the samples in it.
        self.record_format = samples.record_format  # type: ignore[misc]
        self.accepts = samples.accepts  # type: ignore[misc]
        self.target_names = samples.target_names  # type: ignore[misc]
        self.varies = samples.varies  # type: ignore[misc]

    def plan(self, store: Store, epoch: int) -> PackedPlan:
        plan = self.samples.plan(store, epoch)
        order, begins = pack(self.samples.positions(store, plan), self.samples.row_width)
        return PackedPlan(size=len(begins) - 1, skipped=plan.skipped, samples=plan, order=order, begins=begins)

    def sample(self, store: Store, plan: PackedPlan, index: int, rng: np.random.Generator) -> tuple[Any, ...]:
        return tuple(self.samples.sample(store, plan.samples, sample, rng) for sample in plan.row(index))

    def arrays(self, examples: Sequence[tuple[Any, ...]]) -> BatchArrays:
        samples = self.samples.arrays([sample for row in examples for sample in row])
        return join_rows(samples, [len(row) for row in examples], pad_id=self.pad_id)

    def decode_instance(self, instance: Any, rng: np.random.Generator) -> tuple[Any, ...]:
        raise ConfigError("pack_documents: an old dataset.pt does not say how long its documents are; preprocess again")

    def encode_instance(self, example: tuple[Any, ...]) -> Any:
        raise ConfigError("pack_documents: packed rows have no form in an old dataset.pt; leave it out")


def build_processor(
    data: DataConfig, tokenizer: Tokenizer, tgt_tokenizer: Tokenizer | None = None
) -> Processor[Any, Any]:
    """Returns the processor that the settings describe.

    With `full_sentences` a processor lays documents back to back itself; without, whole samples share rows.
    """
    processor: Processor[Any, Any] = PROCESSORS.get(data.data_processor)(data, tokenizer, tgt_tokenizer)
    if data.pack_documents and not data.full_sentences:
        return PackingProcessor(processor, tokenizer, tgt_tokenizer)
    return processor
