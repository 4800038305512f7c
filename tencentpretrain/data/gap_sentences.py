"""Which sentences of a document are taken out (Zhang et al., 2020, PEGASUS, section 3.1)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tencentpretrain.data.random import uniforms
from tencentpretrain.data.store import IndexArray, Store

GAP_SHARE = 0.3


def select_gap_sentences(
    store: Store,
    sentences: IndexArray,
    borders: IndexArray,
    *,
    strategy: Literal["lead", "random", "principal"],
    seed: int,
    version: int,
) -> NDArray[np.bool_]:
    """Marks round(0.3 n) of the n usable sentences of each document.

    lead: the first ones. random: any but the last. principal: those with the largest ROUGE-1 F1 against the rest of
    their document, each judged by itself.

    Args:
        sentences: (usable,) their index in the store.
        borders: (documents + 1,) where each document begins among them.
    """
    counts = np.diff(borders)
    wanted = np.rint(GAP_SHARE * counts).astype(np.int64)  # half to even, as Python rounds
    document = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(sentences)) - borders[:-1][document]
    if strategy == "lead":
        return place < wanted[document]
    if strategy == "random":
        score = uniforms(seed, version, 6, sentences)
        score[place == counts[document] - 1] = 2.0
    else:
        score = 1.0 - _rouge_scores(store, sentences, borders)
    order = np.lexsort((place, score, document))
    rank = np.empty(len(sentences), np.int64)
    rank[order] = np.arange(len(sentences)) - borders[:-1][document[order]]
    return rank < wanted[document]


def _rouge_scores(store: Store, sentences: IndexArray, borders: IndexArray) -> NDArray[np.float64]:
    """Returns the ROUGE-1 F1 of each sentence against all others of its document, over token ids."""
    scores = np.zeros(len(sentences))
    for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        if end - begin < 2:
            continue
        texts = [store.segment(sentence) for sentence in sentences[begin:end].tolist()]
        lengths = np.array([len(text) for text in texts])
        words, inverse = np.unique(np.concatenate(texts), return_inverse=True)
        owner = np.repeat(np.arange(len(texts)), lengths)
        pairs, counts = np.unique(owner * len(words) + inverse, return_counts=True)
        pair_owner, pair_word = pairs // len(words), pairs % len(words)
        elsewhere = np.bincount(inverse, minlength=len(words))[pair_word] - counts
        overlap = np.bincount(pair_owner, weights=np.minimum(counts, elsewhere), minlength=len(texts))
        # F1 = 2 overlap / (length + length of the rest), and the two lengths add up to the document's.
        scores[begin:end] = 2 * overlap / lengths.sum()
    return scores
