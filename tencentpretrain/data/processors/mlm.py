"""Masked-token prediction over documents (Liu et al., 2019, arXiv:1907.11692)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.arrays import BatchArrays, masked_arrays
from tencentpretrain.data.examples import Ids, MaskedExample
from tencentpretrain.data.legacy import apply_labels, pad_instance, unpad_instance
from tencentpretrain.data.masking import Masker
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.data.store import IndexArray, Store
from tencentpretrain.data.windows import WindowPlan, plan_masked_windows
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.tokenizers.base import Tokenizer


@PROCESSORS.register("mlm")
class MlmProcessor(Processor[WindowPlan, MaskedExample]):
    """One document per line: CLS text SEP, in windows of seq_length tokens without overlap.

    With `full_sentences` the documents of a buffer (`docs_buffer_size`) are packed back to back; with `pack_documents`
    too, none of them sees another.
    """

    record_format: ClassVar[RecordFormat] = "lines"
    accepts = ("lines", "sentences")
    target_names = frozenset({"mlm"})

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, tgt_tokenizer: Tokenizer | None = None) -> None:
        super().__init__(data, tokenizer, tgt_tokenizer)
        self.masker = Masker(data, tokenizer)

    def plan(self, store: Store, epoch: int) -> WindowPlan:
        return plan_masked_windows(store, self.data)

    def sample(self, store: Store, plan: WindowPlan, index: int, rng: np.random.Generator) -> MaskedExample:
        ids = plan.window(store, index, cls_id=self.cls_id, sep_id=self.sep_id)
        return self._mask(ids, rng, plan.document_lengths(index) if self.data.pack_documents else ())

    def positions(self, store: Store, plan: WindowPlan) -> IndexArray:
        return plan.lengths()

    def arrays(self, examples: Sequence[MaskedExample]) -> BatchArrays:
        return masked_arrays(examples, seq_length=self.data.seq_length, pad_id=self.pad_id, label_name=None)

    def _mask(self, ids: Ids, rng: np.random.Generator, document_lengths: tuple[int, ...] = ()) -> MaskedExample:
        masked, positions, labels = self.masker.mask(ids, rng)
        return MaskedExample(
            token_ids=masked,
            positions=positions,
            labels=labels,
            segment_ends=(len(ids),),
            document_lengths=document_lengths,
        )

    def decode_instance(self, instance: Any, rng: np.random.Generator) -> MaskedExample:
        ids = unpad_instance(instance[0])
        if len(instance) == 2:
            return self._mask(ids, rng)
        positions, labels = apply_labels(instance[1])
        return MaskedExample(token_ids=ids, positions=positions, labels=labels, segment_ends=(len(ids),))

    def encode_instance(self, example: MaskedExample) -> Any:
        ids = example.token_ids.copy()
        ids[example.positions] = example.labels
        return pad_instance(ids, self.data.seq_length), [len(ids)]
