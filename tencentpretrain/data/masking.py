"""Masking: which tokens are predicted and what stands in their place (Devlin et al., 2019, section 3.1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.examples import Ids
from tencentpretrain.tokenizers.base import Tokenizer

MASKED_SHARE = 0.15
"""Share of tokens, special ones included, that is predicted."""

IntArray = NDArray[np.int64]


def span_length_law(geo_prob: float, max_length: int) -> NDArray[np.float64]:
    """Returns P(1), ..., P(max_length) of the truncated geometric law p (1 - p)^(length - 1), renormalised.

    Source: Joshi et al., 2020 (SpanBERT), section 3.1.
    """
    law: NDArray[np.float64] = np.power(1 - geo_prob, np.arange(max_length), dtype=np.float64)
    law /= law.sum()
    return law


class Masker:
    """Draws masks. Special tokens are never predicted; spans and words end at them.

    Args:
        data: share and kind of masking.
        tokenizer: names the mask, what is special, what a random replacement may be, and where words begin.

    Attributes:
        spans_stop_at_special: False lets a span that begins at an ordinary token run over special ones, as old runs
            did; for comparisons only.
    """

    def __init__(self, data: DataConfig, tokenizer: Tokenizer) -> None:
        self.mask_id = tokenizer.mask_id
        self.special_ids = np.array([tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id])
        self.ordinary_ids = tokenizer.ordinary_ids().astype(np.int64)
        self._span_law = (
            np.cumsum(span_length_law(data.span_geo_prob, data.span_max_length)) if data.span_masking else None
        )
        self.spans_stop_at_special = True
        self._words = tokenizer if data.whole_word_masking else None
        is_special = np.zeros(tokenizer.vocab_size, bool)
        is_special[self.special_ids] = True
        self._is_special = is_special

    def mask(self, token_ids: Ids, rng: np.random.Generator) -> tuple[IntArray, IntArray, IntArray]:
        """Masks an unpadded sequence.

        The number of predicted tokens is max(1, round(0.15 length)), or less where units do not fit or nothing but
        special tokens is there. Of these, 80 % become the mask, 10 % a random ordinary token, 10 % stay; in span
        masking a span has one fate.

        Shapes:
            token_ids: (length,)
            returns: the masked ids (length,); sorted positions (predicted,) and the original ids there.
        """
        ids = np.asarray(token_ids).astype(np.int64)
        budget = max(1, round(MASKED_SHARE * len(ids)))
        maskable = ~self._is_special[ids]
        fates: NDArray[np.float64]
        if self._span_law is not None:
            starts, lengths = self._spans(maskable, rng)
            chosen = _choose(lengths, budget, rng)
            positions = _ranges(starts[chosen], lengths[chosen])
            fates = np.repeat(rng.random(len(chosen)), lengths[chosen])
        elif self._words is not None:
            starts, lengths = _words(self._words.word_starts(ids), maskable)
            chosen = _choose(lengths, budget, rng)
            positions = _ranges(starts[chosen], lengths[chosen])
            fates = rng.random(len(positions))
        else:
            positions = rng.permutation(np.flatnonzero(maskable))[:budget]
            fates = rng.random(len(positions))
        order = np.argsort(positions)
        positions, fates = positions[order], fates[order]
        labels = ids[positions]
        ids[positions[fates < 0.8]] = self.mask_id
        replaced = positions[(fates >= 0.8) & (fates < 0.9)]
        ids[replaced] = self.ordinary_ids[rng.integers(len(self.ordinary_ids), size=len(replaced))]
        return ids, positions, labels

    def _spans(self, maskable: NDArray[np.bool_], rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Cuts the maskable positions into consecutive spans of drawn lengths."""
        assert self._span_law is not None
        drawn = (np.searchsorted(self._span_law, rng.random(len(maskable)), side="right") + 1).tolist()
        if not self.spans_stop_at_special:
            return _spans_over_special(maskable, drawn)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], maskable, [False]]))).tolist()
        starts: list[int] = []
        lengths: list[int] = []
        for begin, end in zip(edges[0::2], edges[1::2], strict=True):
            while begin < end:
                length = min(drawn[len(starts)], end - begin)
                starts.append(begin)
                lengths.append(length)
                begin += length
        return np.array(starts, np.int64), np.array(lengths, np.int64)


def _spans_over_special(maskable: NDArray[np.bool_], drawn: list[int]) -> tuple[IntArray, IntArray]:
    starts: list[int] = []
    lengths: list[int] = []
    position = 0
    while position < len(maskable):
        if maskable[position]:
            starts.append(position)
            lengths.append(min(drawn[len(starts) - 1], len(maskable) - position))
            position += lengths[-1]
        else:
            position += 1
    return np.array(starts, np.int64), np.array(lengths, np.int64)


def _words(word_starts: NDArray[np.bool_], maskable: NDArray[np.bool_]) -> tuple[IntArray, IntArray]:
    """Returns begin and length of each word without special tokens."""
    after_special = np.concatenate([[True], ~maskable[:-1]])
    begins = np.flatnonzero(maskable & (word_starts | after_special))
    borders = np.flatnonzero(~maskable | word_starts | after_special)
    ends = np.append(borders, len(maskable))[np.searchsorted(borders, begins, side="right")]
    return begins, ends - begins


def _choose(lengths: IntArray, budget: int, rng: np.random.Generator) -> IntArray:
    """Takes units in random order, leaving out those that would exceed the budget, until it is spent."""
    chosen = []
    for unit in rng.permutation(len(lengths)).tolist():
        if lengths[unit] <= budget:
            chosen.append(unit)
            budget -= int(lengths[unit])
            if not budget:
                break
    return np.array(chosen, np.int64)


def _ranges(starts: IntArray, lengths: IntArray) -> IntArray:
    """Returns start, start + 1, ..., start + length - 1 of all units one after the other."""
    shift = np.cumsum(lengths) - lengths
    return np.repeat(starts - shift, lengths) + np.arange(int(lengths.sum()))
