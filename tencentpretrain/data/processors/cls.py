"""Texts with a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tencentpretrain.data.arrays import BatchArrays, flat, labelled_arrays
from tencentpretrain.data.examples import LabelledExample
from tencentpretrain.data.legacy import pad_instance, unpad_instance
from tencentpretrain.data.pairs import RecordPlan, plan_records
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.data.store import Store
from tencentpretrain.registry import PROCESSORS


@PROCESSORS.register("cls")
class ClsProcessor(Processor[RecordPlan, LabelledExample]):
    """Label and text, or label and two texts, between tabs: CLS text, or CLS text SEP text SEP, cut to seq_length."""

    record_format: ClassVar[RecordFormat] = "labelled"
    accepts = ("labelled",)
    target_names = frozenset({"cls"})
    single_ends_with_sep: ClassVar[bool] = False

    def plan(self, store: Store, epoch: int) -> RecordPlan:
        return plan_records(store)

    def sample(self, store: Store, plan: RecordPlan, index: int, rng: np.random.Generator) -> LabelledExample:
        label = int(store.labels[plan.record(index)])
        texts = plan.segments(store, index)
        length = self.data.seq_length
        if len(texts) == 1:
            ids = flat([self.cls_id], texts[0], [self.sep_id] if self.single_ends_with_sep else [])[:length]
            return LabelledExample(token_ids=ids, lengths=(len(ids),), label=label)
        ids = flat([self.cls_id], texts[0], [self.sep_id], texts[1], [self.sep_id])[:length]
        first = len(texts[0]) + 2
        lengths = (first, len(ids) - first) if first < len(ids) else (len(ids),)
        return LabelledExample(token_ids=ids, lengths=lengths, label=label)

    def arrays(self, examples: Sequence[LabelledExample]) -> BatchArrays:
        return labelled_arrays(examples, seq_length=self.data.seq_length, pad_id=self.pad_id)

    def decode_instance(self, instance: Any, rng: np.random.Generator) -> LabelledExample:
        padded, label, lengths = instance
        return LabelledExample(token_ids=unpad_instance(padded), lengths=tuple(map(int, lengths)), label=int(label))

    def encode_instance(self, example: LabelledExample) -> Any:
        return pad_instance(example.token_ids, self.data.seq_length), example.label, list(example.lengths)
