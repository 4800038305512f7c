"""Translation pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tencentpretrain.data.arrays import BatchArrays, flat, translation_arrays
from tencentpretrain.data.examples import PairExample
from tencentpretrain.data.legacy import decode_pair, encode_pair
from tencentpretrain.data.pairs import RecordPlan, plan_records
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.data.store import Store
from tencentpretrain.registry import PROCESSORS


@PROCESSORS.register("mt")
class MtProcessor(Processor[RecordPlan, PairExample]):
    """Source and target between tabs: CLS source SEP, cut to seq_length; CLS target SEP, cut to tgt_seq_length + 1."""

    record_format: ClassVar[RecordFormat] = "tsv_pairs"
    accepts = ("pairs",)
    target_names = frozenset({"lm"})
    uses_tgt_tokenizer = True

    def plan(self, store: Store, epoch: int) -> RecordPlan:
        return plan_records(store)

    def sample(self, store: Store, plan: RecordPlan, index: int, rng: np.random.Generator) -> PairExample:
        source, target = plan.segments(store, index)
        return PairExample(
            source_ids=flat([self.cls_id], source, [self.sep_id])[: self.data.seq_length],
            target_ids=flat([self.tgt_cls_id], target, [self.tgt_sep_id])[: self.data.tgt_seq_length + 1],
        )

    def arrays(self, examples: Sequence[PairExample]) -> BatchArrays:
        return translation_arrays(
            examples,
            seq_length=self.data.seq_length,
            tgt_length=self.data.tgt_seq_length,
            pad_id=self.pad_id,
            tgt_pad_id=self.tgt_pad_id,
            loss_on_final_pad=self.data.loss_on_final_pad,
        )

    def decode_instance(self, instance: Any, rng: np.random.Generator) -> PairExample:
        return decode_pair(instance)

    def encode_instance(self, example: PairExample) -> Any:
        return encode_pair(example, self.data.seq_length, self.data.tgt_seq_length + 1)
