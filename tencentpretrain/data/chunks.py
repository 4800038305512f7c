"""Plans over documents of sentences, made for all documents at once: step k cuts the k-th chunk of every document."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tencentpretrain.data.processor import Plan
from tencentpretrain.data.random import uniforms
from tencentpretrain.data.store import IndexArray, Store

LONGEST_DOCUMENT = 4096
"""Sentences; a longer document (a corpus without blank lines) is cut into parts of so many, so that plans stay fast."""


@dataclass(frozen=True, kw_only=True)
class SentencePairPlan(Plan):
    """Two runs of consecutive sentences per sample.

    Shapes:
        document, a_begin, a_end, b_begin, b_end: (size,) a document; first and last + 1 sentence of A and of B.
        label: (size,) 1 where B does not follow A (next sentence) or stands before it (order).
    """

    document: IndexArray
    a_begin: IndexArray
    a_end: IndexArray
    b_begin: IndexArray
    b_end: IndexArray
    label: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ChunkPlan(Plan):
    """Runs of consecutive usable sentences.

    Shapes:
        sentences: (usable,) the index of each usable sentence among all of the store.
        selected: (usable,) whether a gap-sentence objective takes it out.
        begin, end: (size,) first and last + 1 of `sentences` in each run.
    """

    sentences: IndexArray
    selected: NDArray[np.bool_]
    begin: IndexArray
    end: IndexArray


def whole(values: NDArray[np.float64], counts: IndexArray | int) -> IndexArray:
    """Turns numbers in [0, 1) into integers in [0, count)."""
    integers: IndexArray = np.minimum((values * counts).astype(np.int64), np.maximum(np.asarray(counts) - 1, 0))
    return integers


def plan_sentence_pairs(
    store: Store, *, seq_length: int, short_seq_prob: float, buffer_size: int | None, seed: int, version: int
) -> SentencePairPlan:
    """Cuts every document into chunks of about the target length, and each chunk into A and B.

    Args:
        buffer_size: documents among which another document is drawn for B with probability 1/2, and for every chunk of
            a single sentence; the sentences that B would have had are used again. None: B is always the rest of the
            chunk, and the label is drawn with probability 1/2 by itself.
    """
    ends = store.segment_offsets
    borders = cut_long_documents(store.record_offsets)
    first, last = borders[:-1], borders[1:]
    documents = np.arange(len(first))
    room = seq_length - 3
    short = uniforms(seed, version, 0, documents) < short_seq_prob
    target = np.where(short, 2 + whole(uniforms(seed, version, 1, documents), room - 1), room)

    rows: list[tuple[NDArray[np.int64], ...]] = []
    active, begin, step = documents, first, 0
    while len(active):
        limit = last[active]
        end = np.minimum(np.searchsorted(ends, ends[begin] + target[active]), limit)
        count = end - begin

        def draw(number: int, active: IndexArray = active, step: int = step) -> NDArray[np.float64]:
            return uniforms(seed, version, number, active, step)

        middle = begin + 1 + whole(draw(2), np.maximum(count - 1, 1)) * (count > 1)
        label = draw(3) < 0.5
        b_begin, b_end, following = middle, end, end
        if buffer_size is not None:
            label |= count == 1
            other = _other_document(active, len(first), buffer_size, draw(4))
            other_begin = first[other] + whole(draw(5), last[other] - first[other])
            missing = target[active] - (ends[middle] - ends[begin])
            other_end = np.searchsorted(ends, ends[other_begin] + missing)
            other_end = np.minimum(np.maximum(other_end, other_begin + 1), last[other])
            b_begin, b_end = np.where(label, other_begin, middle), np.where(label, other_end, end)
            following = np.where(label, middle, end)
        rows.append((active, begin, middle, b_begin, b_end, label.astype(np.int64)))
        goes_on = following < limit
        active, begin, step = active[goes_on], following[goes_on], step + 1

    if not rows:
        rows.append(tuple(np.zeros(0, np.int64) for _ in range(6)))
    columns = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    document, a_begin, a_end, b_begin, b_end, labels = (column[order] for column in columns)
    return SentencePairPlan(
        size=len(order),
        document=document,
        a_begin=a_begin,
        a_end=a_end,
        b_begin=b_begin,
        b_end=b_end,
        label=labels.astype(bool),
    )


def _other_document(
    document: IndexArray, num_documents: int, buffer_size: int, draw: NDArray[np.float64]
) -> IndexArray:
    """Draws another document of the same buffer; a document that is alone in it stands for itself."""
    start = document // buffer_size * buffer_size
    size = np.minimum(start + buffer_size, num_documents) - start
    other = whole(draw, np.maximum(size - 1, 1))
    other += other >= document - start
    return np.where(size > 1, start + other, document)


def cut_long_documents(borders: IndexArray) -> IndexArray:
    """Adds borders inside documents of more than `LONGEST_DOCUMENT` sentences.

    Shapes:
        borders: (documents + 1,) where each document begins.
    """
    parts = np.maximum(-(-np.diff(borders) // LONGEST_DOCUMENT), 1)
    if not len(parts) or parts.max() == 1:
        return borders
    first_part = np.cumsum(parts) - parts
    place = np.arange(int(parts.sum())) - np.repeat(first_part, parts)
    return np.append(np.repeat(borders[:-1], parts) + place * LONGEST_DOCUMENT, borders[-1])


def usable_sentences(store: Store, longest: int) -> tuple[IndexArray, IndexArray]:
    """Returns the sentences of at most `longest` tokens, and where each document begins among them (documents + 1,)."""
    usable = np.diff(store.segment_offsets) <= longest
    before = np.zeros(len(usable) + 1, np.int64)
    np.cumsum(usable, out=before[1:])
    return np.flatnonzero(usable), before[store.record_offsets]


def fill_chunks(costs: list[tuple[IndexArray, int]], borders: IndexArray) -> tuple[IndexArray, IndexArray]:
    """Cuts documents greedily: a run grows while every cost stays below its limit; it has at least one sentence.

    Args:
        costs: per cost, (sentences,) what each sentence adds, and the limit.
        borders: (documents + 1,) where each document begins among the sentences.

    Returns:
        begin, end: (runs,) in document order.
    """
    totals = []
    for cost, limit in costs:
        total = np.zeros(len(cost) + 1, np.int64)
        np.cumsum(cost, out=total[1:])
        totals.append((total, limit))
    borders = cut_long_documents(borders)
    active = np.flatnonzero(np.diff(borders))
    begin = borders[active]
    parts: list[tuple[IndexArray, IndexArray, IndexArray]] = []
    while len(active):
        end = borders[active + 1]
        limit_of_document = end
        for total, limit in totals:
            end = np.minimum(end, np.searchsorted(total, total[begin] + limit) - 1)
        end = np.maximum(end, begin + 1)
        parts.append((active, begin, end))
        goes_on = end < limit_of_document
        active, begin = active[goes_on], end[goes_on]
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    document, begins, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(document, kind="stable")
    return begins[order], ends[order]


def cut_pair(a_length: int, b_length: int, room: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Shortens A and B to `room` tokens together, always the longer one (ties: B), at either end with equal chance.

    Returns:
        first and last + 1 token that stay of A, then of B.
    """
    excess = max(a_length + b_length - room, 0)
    level = min(excess, abs(a_length - b_length))
    rest = excess - level
    from_a = (level if a_length > b_length else 0) + rest // 2
    from_b = (level if a_length <= b_length else 0) + rest - rest // 2
    a_front = int(rng.binomial(from_a, 0.5)) if from_a else 0
    b_front = int(rng.binomial(from_b, 0.5)) if from_b else 0
    return a_front, a_length - (from_a - a_front), b_front, b_length - (from_b - b_front)
