"""Span corruption with sentinels (Raffel et al., 2020, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.arrays import BatchArrays, translation_arrays
from tencentpretrain.data.examples import Ids, PairExample
from tencentpretrain.data.legacy import apply_labels, pad_instance, unpad_instance
from tencentpretrain.data.masking import Masker
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.data.store import Store
from tencentpretrain.data.windows import WindowPlan, plan_masked_windows
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.tokenizers.base import Tokenizer


@PROCESSORS.register("t5")
class T5Processor(Processor[WindowPlan, PairExample]):
    """Documents as for `mlm`; each run of chosen tokens becomes a sentinel in the source and its text in the target.

    The target is CLS, each sentinel with its tokens, the next sentinel, SEP. Runs beyond the last sentinel stay as
    they are. The choice is that of masking; with `span_masking` it is spans.
    """

    record_format: ClassVar[RecordFormat] = "lines"
    accepts = ("lines", "sentences")
    target_names = frozenset({"lm"})

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, tgt_tokenizer: Tokenizer | None = None) -> None:
        super().__init__(data, tokenizer, tgt_tokenizer)
        if tokenizer.sentinel_id is None or tokenizer.num_sentinels < 2:
            raise ConfigError(
                f"data_processor: 't5' needs at least two sentinel tokens, but {tokenizer.source} has "
                f"{tokenizer.num_sentinels}; take a vocabulary with <extra_id_0>, <extra_id_1>, ..."
            )
        self.first_sentinel = tokenizer.sentinel_id
        self.num_sentinels = tokenizer.num_sentinels
        self.masker = Masker(data, tokenizer)

    def plan(self, store: Store, epoch: int) -> WindowPlan:
        return plan_masked_windows(store, self.data)

    def sample(self, store: Store, plan: WindowPlan, index: int, rng: np.random.Generator) -> PairExample:
        return self._corrupt(plan.window(store, index, cls_id=self.cls_id, sep_id=self.sep_id), rng)

    def arrays(self, examples: Sequence[PairExample]) -> BatchArrays:
        return translation_arrays(
            examples,
            seq_length=self.data.seq_length,
            tgt_length=max(len(example.target_ids) for example in examples),
            pad_id=self.pad_id,
            tgt_pad_id=self.tgt_pad_id,
            loss_on_final_pad=self.data.loss_on_final_pad,
        )

    def _corrupt(self, ids: Ids, rng: np.random.Generator) -> PairExample:
        _, positions, labels = self.masker.mask(ids, rng)
        return self.replace_runs(ids, positions, labels)

    def replace_runs(self, ids: Ids, positions: Ids, labels: Ids) -> PairExample:
        """Replaces each run of adjacent positions by a sentinel.

        Shapes:
            ids: (length,)
            positions, labels: (chosen,) sorted, and the tokens that belong there.
        """
        starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
        runs = np.split(np.arange(len(positions)), starts[1:]) if len(positions) else []
        source, target = ids.tolist(), [self.tgt_cls_id]
        for run in runs[self.num_sentinels - 1 :]:
            for place in run.tolist():
                source[int(positions[place])] = int(labels[place])
        runs = runs[: self.num_sentinels - 1]
        for number, run in enumerate(runs):
            target += [self.first_sentinel + number, *labels[run].tolist()]
        for number, run in reversed(list(enumerate(runs))):
            source[int(positions[run[0]]) : int(positions[run[-1]]) + 1] = [self.first_sentinel + number]
        target += [self.first_sentinel + len(runs), self.tgt_sep_id]
        return PairExample(source_ids=np.array(source, np.int64), target_ids=np.array(target, np.int64))

    def decode_instance(self, instance: Any, rng: np.random.Generator) -> PairExample:
        ids = unpad_instance(instance[0])
        if len(instance) == 2:
            return self._corrupt(ids, rng)
        return self.replace_runs(ids, *apply_labels(instance[1]))

    def encode_instance(self, example: PairExample) -> Any:
        """Returns the uncorrupted instance, as with dynamic masking."""
        spans: list[list[int]] = []
        for token in example.target_ids[1:-2].tolist():
            if token == self.first_sentinel + len(spans):
                spans.append([])
            else:
                spans[-1].append(token)
        ids: list[int] = []
        for token in example.source_ids.tolist():
            number = token - self.first_sentinel
            ids += spans[number] if 0 <= number < len(spans) else [token]
        return pad_instance(np.array(ids, np.int64), self.data.seq_length), [len(ids)]
