"""Gap-sentence generation (Zhang et al., 2020, PEGASUS, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.arrays import BatchArrays, translation_arrays
from tencentpretrain.data.chunks import ChunkPlan, fill_chunks, usable_sentences
from tencentpretrain.data.examples import PairExample
from tencentpretrain.data.gap_sentences import select_gap_sentences
from tencentpretrain.data.legacy import decode_pair, encode_pair
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.data.store import Store
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.tokenizers.base import Tokenizer


@PROCESSORS.register("gsg")
class GsgProcessor(Processor[ChunkPlan, PairExample]):
    """One sentence per line, a blank line between documents; the target is the sentences taken out of the source.

    Three tenths of the sentences are taken out by `sentence_selection_strategy`; a mask stands for each.
    """

    record_format: ClassVar[RecordFormat] = "sentences"
    accepts = ("sentences",)
    target_names = frozenset({"lm"})

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, tgt_tokenizer: Tokenizer | None = None) -> None:
        super().__init__(data, tokenizer, tgt_tokenizer)
        self.mask_id = tokenizer.mask_id

    @property
    def num_plans(self) -> int:
        return self.data.dup_factor if self.data.sentence_selection_strategy == "random" else 1

    def plan_version(self, epoch: int) -> int:
        return epoch % self.num_plans

    def plan(self, store: Store, epoch: int) -> ChunkPlan:
        source_room, target_room = self.data.seq_length - 2, self.data.tgt_seq_length - 2
        sentences, borders = usable_sentences(store, min(source_room, target_room) - 1)
        lengths = np.diff(store.segment_offsets)[sentences]
        selected = select_gap_sentences(
            store,
            sentences,
            borders,
            strategy=self.data.sentence_selection_strategy,
            seed=self.data.seed,
            version=self.plan_version(epoch),
        )
        begin, end = fill_chunks(
            [(np.where(selected, 1, lengths), source_room), (np.where(selected, lengths, 0), target_room)], borders
        )
        gaps = np.concatenate([[0], np.cumsum(selected)])
        count = gaps[end] - gaps[begin]
        emitted = count > 0
        return ChunkPlan(
            size=int(emitted.sum()),
            sentences=sentences,
            selected=selected,
            begin=begin[emitted],
            end=end[emitted],
        )

    def sample(self, store: Store, plan: ChunkPlan, index: int, rng: np.random.Generator) -> PairExample:
        source, target = [self.cls_id], [self.tgt_cls_id]
        for place in range(int(plan.begin[index]), int(plan.end[index])):
            tokens = store.segment(int(plan.sentences[place])).tolist()
            if plan.selected[place]:
                source.append(self.mask_id)
                target += tokens
            else:
                source += tokens
        source.append(self.sep_id)
        target.append(self.tgt_sep_id)
        return PairExample(source_ids=np.array(source, np.int64), target_ids=np.array(target, np.int64))

    def arrays(self, examples: Sequence[PairExample]) -> BatchArrays:
        return translation_arrays(
            examples,
            seq_length=self.data.seq_length,
            tgt_length=self.data.tgt_seq_length - 1,
            pad_id=self.pad_id,
            tgt_pad_id=self.tgt_pad_id,
            loss_on_final_pad=self.data.loss_on_final_pad,
        )

    def decode_instance(self, instance: Any, rng: np.random.Generator) -> PairExample:
        return decode_pair(instance)

    def encode_instance(self, example: PairExample) -> Any:
        return encode_pair(example, self.data.seq_length, self.data.tgt_seq_length)
