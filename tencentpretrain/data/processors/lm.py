"""Next-token prediction over documents (Radford et al., 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tencentpretrain.data.arrays import BatchArrays, causal_arrays
from tencentpretrain.data.examples import WindowExample
from tencentpretrain.data.legacy import pad_instance, unpad_instance
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.data.store import IndexArray, Store
from tencentpretrain.data.windows import WindowPlan, plan_windows
from tencentpretrain.registry import PROCESSORS


@PROCESSORS.register("lm")
class LmProcessor(Processor[WindowPlan, WindowExample]):
    """One document per line: CLS text SEP, in windows of seq_length + 1 tokens without overlap.

    With `full_sentences` the documents are packed back to back and the last, unfilled window is dropped; with
    `pack_documents` too, none of them sees another.
    """

    record_format: ClassVar[RecordFormat] = "lines"
    accepts = ("lines", "sentences")
    target_names = frozenset({"lm"})

    def plan(self, store: Store, epoch: int) -> WindowPlan:
        return plan_windows(
            store,
            self.data.seq_length + 1,
            wrapped=True,
            packed=0 if self.data.full_sentences else None,
            drop_tail=self.data.full_sentences,
            keep_blank=self.data.keep_blank_lines,
        )

    def sample(self, store: Store, plan: WindowPlan, index: int, rng: np.random.Generator) -> WindowExample:
        return WindowExample(
            token_ids=plan.window(store, index, cls_id=self.cls_id, sep_id=self.sep_id),
            document_lengths=plan.document_lengths(index) if self.data.pack_documents else (),
        )

    def positions(self, store: Store, plan: WindowPlan) -> IndexArray:
        return np.minimum(plan.lengths(), self.data.seq_length)

    def arrays(self, examples: Sequence[WindowExample]) -> BatchArrays:
        return causal_arrays(
            examples,
            seq_length=self.data.seq_length,
            pad_id=self.pad_id,
            loss_on_final_pad=self.data.loss_on_final_pad,
        )

    def decode_instance(self, instance: Any, rng: np.random.Generator) -> WindowExample:
        padded, _ = instance
        return WindowExample(token_ids=unpad_instance(padded))

    def encode_instance(self, example: WindowExample) -> Any:
        length = len(example.token_ids)
        padded = pad_instance(example.token_ids, self.data.seq_length + 1)
        return padded, [min(length, self.data.seq_length)]
