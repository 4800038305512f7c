"""Masked tokens and next-sentence prediction (Devlin et al., 2019, sections 3.1 and A.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.arrays import BatchArrays, flat, masked_arrays
from tencentpretrain.data.chunks import SentencePairPlan, cut_pair, plan_sentence_pairs
from tencentpretrain.data.examples import Ids, MaskedExample
from tencentpretrain.data.legacy import apply_labels, pad_instance, unpad_instance
from tencentpretrain.data.masking import Masker
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.data.store import Store
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.tokenizers.base import Tokenizer


@PROCESSORS.register("bert")
class BertProcessor(Processor[SentencePairPlan, MaskedExample]):
    """One sentence per line, a blank line between documents: CLS A SEP B SEP, masked.

    B follows A (label 0) or comes from another document of the same buffer of `docs_buffer_size` (label 1).
    """

    record_format: ClassVar[RecordFormat] = "sentences"
    accepts = ("sentences",)
    target_names = frozenset({"mlm", "sp"})
    varies = True

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, tgt_tokenizer: Tokenizer | None = None) -> None:
        super().__init__(data, tokenizer, tgt_tokenizer)
        self.masker = Masker(data, tokenizer)

    def plan(self, store: Store, epoch: int) -> SentencePairPlan:
        return self._plan(store, epoch, self.data.docs_buffer_size)

    def sample(self, store: Store, plan: SentencePairPlan, index: int, rng: np.random.Generator) -> MaskedExample:
        offsets = store.segment_offsets
        a = store.tokens(int(offsets[plan.a_begin[index]]), int(offsets[plan.a_end[index]]))
        b = store.tokens(int(offsets[plan.b_begin[index]]), int(offsets[plan.b_end[index]]))
        return self._pair(a, b, int(plan.label[index]), rng)

    def arrays(self, examples: Sequence[MaskedExample]) -> BatchArrays:
        return masked_arrays(examples, seq_length=self.data.seq_length, pad_id=self.pad_id, label_name="sp")

    def _plan(self, store: Store, epoch: int, buffer_size: int | None) -> SentencePairPlan:
        return plan_sentence_pairs(
            store,
            seq_length=self.data.seq_length,
            short_seq_prob=self.data.short_seq_prob,
            buffer_size=buffer_size,
            seed=self.data.seed,
            version=self.plan_version(epoch),
        )

    def _pair(self, a: Ids, b: Ids, label: int, rng: np.random.Generator) -> MaskedExample:
        a_first, a_last, b_first, b_last = cut_pair(len(a), len(b), self.data.seq_length - 3, rng)
        ids = flat([self.cls_id], a[a_first:a_last], [self.sep_id], b[b_first:b_last], [self.sep_id])
        return self._mask(ids, label, (a_last - a_first + 2, len(ids)), rng)

    def _mask(self, ids: Ids, label: int, ends: tuple[int, ...], rng: np.random.Generator) -> MaskedExample:
        masked, positions, labels = self.masker.mask(ids, rng)
        return MaskedExample(token_ids=masked, positions=positions, labels=labels, segment_ends=ends, label=label)

    def decode_instance(self, instance: Any, rng: np.random.Generator) -> MaskedExample:
        ids = unpad_instance(instance[0])
        *_, label, (end_a, end_b) = instance
        if len(instance) == 3:
            return self._mask(ids, int(label), (int(end_a), int(end_b)), rng)
        positions, labels = apply_labels(instance[1])
        ends = (int(end_a), int(end_b))
        return MaskedExample(token_ids=ids, positions=positions, labels=labels, segment_ends=ends, label=int(label))

    def encode_instance(self, example: MaskedExample) -> Any:
        pairs = list(zip(example.positions.tolist(), example.labels.tolist(), strict=True))
        return pad_instance(example.token_ids, self.data.seq_length), pairs, example.label, list(example.segment_ends)
