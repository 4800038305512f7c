"""Masked tokens and sentence-order prediction (Lan et al., 2020, section 3.1)."""

from __future__ import annotations

import numpy as np

from tencentpretrain.data.chunks import SentencePairPlan
from tencentpretrain.data.examples import MaskedExample
from tencentpretrain.data.processors.bert import BertProcessor
from tencentpretrain.data.store import Store
from tencentpretrain.registry import PROCESSORS


@PROCESSORS.register("albert")
class AlbertProcessor(BertProcessor):
    """One sentence per line, a blank line between documents: CLS A SEP B SEP, masked.

    A and B follow each other; with probability 1/2 they change places (label 1). B of a chunk of one sentence is empty.
    """

    def plan(self, store: Store, epoch: int) -> SentencePairPlan:
        return self._plan(store, epoch, None)

    def sample(self, store: Store, plan: SentencePairPlan, index: int, rng: np.random.Generator) -> MaskedExample:
        offsets = store.segment_offsets
        a = store.tokens(int(offsets[plan.a_begin[index]]), int(offsets[plan.a_end[index]]))
        b = store.tokens(int(offsets[plan.b_begin[index]]), int(offsets[plan.b_end[index]]))
        swapped = bool(plan.label[index])
        return self._pair(b, a, 1, rng) if swapped else self._pair(a, b, 0, rng)
