"""Instructions with answers (Ouyang et al., 2022, section 3.2, supervised fine-tuning)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tencentpretrain.data.arrays import BatchArrays, flat, prompt_arrays
from tencentpretrain.data.examples import PrefixExample
from tencentpretrain.data.legacy import pad_instance, unpad_instance
from tencentpretrain.data.pairs import RecordPlan, plan_records
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.data.store import IndexArray, Store
from tencentpretrain.registry import PROCESSORS


@PROCESSORS.register("llm_sft")
class LlmSftProcessor(Processor[RecordPlan, PrefixExample]):
    """JSON lines with "instruction", "input" and "output": CLS instruction input output SEP, cut to seq_length.

    Segment 2 marks the positions that predict the output and its SEP. A prompt longer than seq_length is skipped.
    """

    record_format: ClassVar[RecordFormat] = "instructions"
    accepts = ("pairs",)
    target_names = frozenset({"lm"})

    def plan(self, store: Store, epoch: int) -> RecordPlan:
        return plan_records(store, longest_first=self.data.seq_length - 1)

    def sample(self, store: Store, plan: RecordPlan, index: int, rng: np.random.Generator) -> PrefixExample:
        prompt, answer = plan.segments(store, index)
        ids = flat([self.cls_id], prompt, answer, [self.sep_id])
        return PrefixExample(token_ids=ids[: self.data.seq_length], prefix_length=len(prompt) + 1)

    @property
    def row_width(self) -> int:
        return self.data.seq_length - 1

    def positions(self, store: Store, plan: RecordPlan) -> IndexArray:
        return np.minimum(plan.lengths(store) + 2, self.data.seq_length) - 1

    def arrays(self, examples: Sequence[PrefixExample]) -> BatchArrays:
        return prompt_arrays(examples, seq_length=self.data.seq_length, pad_id=self.pad_id)

    def decode_instance(self, instance: Any, rng: np.random.Generator) -> PrefixExample:
        padded, (prefix_length, _) = instance
        return PrefixExample(token_ids=unpad_instance(padded), prefix_length=int(prefix_length))

    def encode_instance(self, example: PrefixExample) -> Any:
        padded = pad_instance(example.token_ids, self.data.seq_length)
        return padded, [example.prefix_length, len(example.token_ids)]
