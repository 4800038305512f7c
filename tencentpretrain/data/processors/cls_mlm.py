"""Texts with a class, and masked tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.arrays import BatchArrays, masked_arrays
from tencentpretrain.data.examples import LabelledExample, MaskedExample
from tencentpretrain.data.legacy import apply_labels, pad_instance, unpad_instance
from tencentpretrain.data.masking import Masker
from tencentpretrain.data.pairs import RecordPlan, plan_records
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.processors.cls import ClsProcessor
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.data.store import Store
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.tokenizers.base import Tokenizer


class _EndedText(ClsProcessor):
    """Samples of `cls` whose single texts end with SEP."""

    single_ends_with_sep = True


@PROCESSORS.register("cls_mlm")
class ClsMlmProcessor(Processor[RecordPlan, MaskedExample]):
    """Corpus as for `cls`: CLS text SEP, or CLS text SEP text SEP, cut to seq_length and masked."""

    record_format: ClassVar[RecordFormat] = "labelled"
    accepts = ("labelled",)
    target_names = frozenset({"mlm", "cls"})

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, tgt_tokenizer: Tokenizer | None = None) -> None:
        super().__init__(data, tokenizer, tgt_tokenizer)
        self.masker = Masker(data, tokenizer)
        self._text = _EndedText(data, tokenizer)

    def plan(self, store: Store, epoch: int) -> RecordPlan:
        return plan_records(store)

    def sample(self, store: Store, plan: RecordPlan, index: int, rng: np.random.Generator) -> MaskedExample:
        return self._mask(self._text.sample(store, plan, index, rng), rng)

    def arrays(self, examples: Sequence[MaskedExample]) -> BatchArrays:
        return masked_arrays(examples, seq_length=self.data.seq_length, pad_id=self.pad_id, label_name="cls")

    def _mask(self, text: LabelledExample, rng: np.random.Generator) -> MaskedExample:
        masked, positions, labels = self.masker.mask(text.token_ids, rng)
        ends = tuple(np.cumsum(text.lengths).tolist())
        return MaskedExample(token_ids=masked, positions=positions, labels=labels, segment_ends=ends, label=text.label)

    def decode_instance(self, instance: Any, rng: np.random.Generator) -> MaskedExample:
        if len(instance) == 3:
            return self._mask(self._text.decode_instance(instance, rng), rng)
        padded, pairs, label, lengths = instance
        positions, labels = apply_labels(pairs)
        return MaskedExample(
            token_ids=unpad_instance(padded),
            positions=positions,
            labels=labels,
            segment_ends=tuple(np.cumsum(lengths).tolist()),
            label=int(label),
        )

    def encode_instance(self, example: MaskedExample) -> Any:
        """Returns the unmasked instance, as with dynamic masking."""
        ids = example.token_ids.copy()
        ids[example.positions] = example.labels
        lengths = np.diff(example.segment_ends, prepend=0).tolist()
        return pad_instance(ids, self.data.seq_length), example.label, lengths
