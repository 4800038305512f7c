"""A forward and a backward language model over documents (Peters et al., 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tencentpretrain.data.arrays import BatchArrays, bidirectional_arrays
from tencentpretrain.data.examples import WindowExample
from tencentpretrain.data.legacy import pad_instance, unpad_instance
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.data.store import Store
from tencentpretrain.data.windows import WindowPlan, plan_windows
from tencentpretrain.registry import PROCESSORS


@PROCESSORS.register("bilm")
class BilmProcessor(Processor[WindowPlan, WindowExample]):
    """One document per line, in windows of seq_length tokens; each window stands between CLS and SEP in its labels."""

    record_format: ClassVar[RecordFormat] = "lines"
    accepts = ("lines", "sentences")
    target_names = frozenset({"bilm"})

    def plan(self, store: Store, epoch: int) -> WindowPlan:
        return plan_windows(store, self.data.seq_length, wrapped=False, packed=None, drop_tail=False, keep_blank=False)

    def sample(self, store: Store, plan: WindowPlan, index: int, rng: np.random.Generator) -> WindowExample:
        return WindowExample(token_ids=plan.window(store, index, cls_id=self.cls_id, sep_id=self.sep_id))

    def arrays(self, examples: Sequence[WindowExample]) -> BatchArrays:
        return bidirectional_arrays(
            examples, seq_length=self.data.seq_length, pad_id=self.pad_id, cls_id=self.cls_id, sep_id=self.sep_id
        )

    def decode_instance(self, instance: Any, rng: np.random.Generator) -> WindowExample:
        padded, _forward, _backward, _ = instance
        return WindowExample(token_ids=unpad_instance(padded))

    def encode_instance(self, example: WindowExample) -> Any:
        batch = self.arrays([example])
        length = len(example.token_ids)
        forward = batch.labels["bilm_forward"][0, :length].tolist()
        backward = batch.labels["bilm_backward"][0, :length].tolist()
        padded = pad_instance(example.token_ids, self.data.seq_length)
        return padded, forward, backward, [length]
