"""Continuations of a prefix (Dong et al., 2019, section 2.3, sequence-to-sequence mask)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tencentpretrain.data.arrays import BatchArrays, flat, prefix_arrays
from tencentpretrain.data.examples import PrefixExample
from tencentpretrain.data.legacy import pad_instance, unpad_instance
from tencentpretrain.data.pairs import RecordPlan, plan_records
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.data.store import Store
from tencentpretrain.registry import PROCESSORS


@PROCESSORS.register("prefixlm")
class PrefixLmProcessor(Processor[RecordPlan, PrefixExample]):
    """Prefix and continuation between tabs: CLS prefix SEP continuation SEP; a prefix that leaves no room is skipped.

    Exactly the tokens of the continuation and its SEP are predicted.
    """

    record_format: ClassVar[RecordFormat] = "tsv_pairs"
    accepts = ("pairs",)
    target_names = frozenset({"lm"})

    def plan(self, store: Store, epoch: int) -> RecordPlan:
        return plan_records(store, longest_first=self.data.seq_length - 3)

    def sample(self, store: Store, plan: RecordPlan, index: int, rng: np.random.Generator) -> PrefixExample:
        prefix, continuation = plan.segments(store, index)
        ids = flat([self.cls_id], prefix, [self.sep_id], continuation, [self.sep_id])
        # One token more than the model reads: the label of the last position.
        return PrefixExample(token_ids=ids[: self.data.seq_length + 1], prefix_length=len(prefix) + 2)

    def arrays(self, examples: Sequence[PrefixExample]) -> BatchArrays:
        return prefix_arrays(examples, seq_length=self.data.seq_length, pad_id=self.pad_id)

    def decode_instance(self, instance: Any, rng: np.random.Generator) -> PrefixExample:
        padded, labels, (prefix_length, length) = instance
        ids = unpad_instance(padded)
        if len(labels) >= len(ids) == length and labels[len(ids) - 1] != self.pad_id:
            ids = np.append(ids, labels[len(ids) - 1])
        return PrefixExample(token_ids=ids, prefix_length=int(prefix_length))

    def encode_instance(self, example: PrefixExample) -> Any:
        ids = example.token_ids[: self.data.seq_length]
        labels = self.arrays([example]).labels["lm"][0, : len(ids)]
        padded = pad_instance(ids, self.data.seq_length)
        return padded, np.maximum(labels, 0).tolist(), [example.prefix_length, len(ids)]
