"""Denoising of shuffled sentences with infilling (Lewis et al., 2020, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.arrays import BatchArrays, flat, translation_arrays
from tencentpretrain.data.chunks import ChunkPlan, fill_chunks, usable_sentences
from tencentpretrain.data.examples import Ids, PairExample
from tencentpretrain.data.infilling import infill
from tencentpretrain.data.legacy import encode_pair, unpad_instance
from tencentpretrain.data.masking import Masker
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.data.store import Store
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.tokenizers.base import Tokenizer


@PROCESSORS.register("bart")
class BartProcessor(Processor[ChunkPlan, PairExample]):
    """One sentence per line, a blank line between documents; the target is up to seq_length tokens in order.

    The source is the same sentences in random order, corrupted: with `text_infilling` spans of Poisson(3) tokens each
    become one mask (30 % of the tokens), else 15 % are masked as for `bert` and adjacent masks become one. Both are
    drawn anew every epoch.
    """

    record_format: ClassVar[RecordFormat] = "sentences"
    accepts = ("sentences",)
    target_names = frozenset({"lm"})

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, tgt_tokenizer: Tokenizer | None = None) -> None:
        super().__init__(data, tokenizer, tgt_tokenizer)
        self.masker = Masker(data, tokenizer)

    def draw_version(self, epoch: int) -> int:
        return epoch

    def plan(self, store: Store, epoch: int) -> ChunkPlan:
        room = self.data.seq_length - 2
        sentences, borders = usable_sentences(store, room)
        begin, end = fill_chunks([(np.diff(store.segment_offsets)[sentences], room)], borders)
        return ChunkPlan(
            size=len(begin), sentences=sentences, selected=np.zeros(len(sentences), bool), begin=begin, end=end
        )

    def sample(self, store: Store, plan: ChunkPlan, index: int, rng: np.random.Generator) -> PairExample:
        source, target = self.shuffled(store, plan, index, rng)
        return PairExample(source_ids=self._corrupt(source, rng), target_ids=target)

    def shuffled(self, store: Store, plan: ChunkPlan, index: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """Returns a sample's sentences in random and in their own order, each between CLS and SEP."""
        places = range(int(plan.begin[index]), int(plan.end[index]))
        texts = [store.segment(int(plan.sentences[place])) for place in places]
        order = rng.permutation(len(texts)).tolist()
        source = flat([self.cls_id], *(texts[place] for place in order), [self.sep_id])
        return source, flat([self.tgt_cls_id], *texts, [self.tgt_sep_id])

    def arrays(self, examples: Sequence[PairExample]) -> BatchArrays:
        return translation_arrays(
            examples,
            seq_length=self.data.seq_length,
            tgt_length=self.data.seq_length - 1,
            pad_id=self.pad_id,
            tgt_pad_id=self.tgt_pad_id,
            loss_on_final_pad=self.data.loss_on_final_pad,
        )

    def _corrupt(self, source: Ids, rng: np.random.Generator) -> Ids:
        mask_id = self.masker.mask_id
        if self.data.text_infilling:
            inner = infill(source[1:-1], mask_id, rng)[: self.data.seq_length - 2]
            return flat(source[:1], inner, source[-1:])
        masked, _, _ = self.masker.mask(source, rng)
        is_mask = masked == mask_id
        is_mask[1:] &= is_mask[:-1].copy()
        is_mask[0] = False
        kept: Ids = masked[~is_mask]
        return kept

    def decode_instance(self, instance: Any, rng: np.random.Generator) -> PairExample:
        source, target, _ = instance
        return PairExample(source_ids=self._corrupt(unpad_instance(source), rng), target_ids=unpad_instance(target))

    def encode_instance(self, example: PairExample) -> Any:
        return encode_pair(example, self.data.seq_length, self.data.seq_length)
