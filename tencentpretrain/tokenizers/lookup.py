"""Bulk look-up with NumPy: ids of single characters from a table, ids of words from a cache.

Text becomes an array of code points. A table gives each code point an id or a class; only runs that a table cannot
answer are cut out as strings, and natural text repeats those so often that nearly all are found in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tencentpretrain.tokenizers.base import Offsets, TokenIds

UNSEEN = -128
"""Table entry of a code point that has not been met yet."""

_CODE_POINTS = 0x110000
_MAX_WORDS, _MAX_CHARS = 1 << 18, 1 << 23  # about 60 MB; natural text fills it in millions of tokens


def code_points(text: str) -> NDArray[np.uint32]:
    """Returns the Unicode code points of a text as a read-only array."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def text_bounds(texts: Sequence[str], gap: int) -> NDArray[np.int64]:
    """Returns where each text begins in their concatenation with `gap` characters after each; (len(texts) + 1,)."""
    bounds = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + gap, out=bounds[1:])
    return bounds


class CharTable:
    """A value for every code point, worked out when a code point is first met.

    Args:
        value_of: gives the value of one character; must not return `UNSEEN`.
    """

    def __init__(self, value_of: Callable[[str], int]) -> None:
        self._value_of = value_of
        self._values = np.full(_CODE_POINTS, UNSEEN, np.int32)

    def __reduce__(self) -> tuple[type[CharTable], tuple[Callable[[str], int]]]:
        return CharTable, (self._value_of,)  # a worker process fills its own table

    def __getitem__(self, points: NDArray[np.uint32]) -> NDArray[np.int32]:
        values = self._values[points]
        unseen = values == UNSEEN
        if unseen.any():
            for point in np.unique(points[unseen]).tolist():
                self._values[point] = self._value_of(chr(point))
            values = self._values[points]
        return values


class WordCache:
    """Remembers the ids of words.

    Args:
        encode_words: gives the ids of words that are not in the cache, in the form of `Tokenizer.encode_packed`.
    """

    def __init__(self, encode_words: Callable[[list[str]], tuple[TokenIds, Offsets]]) -> None:
        self._encode_words = encode_words
        self._clear()

    def __reduce__(self) -> tuple[type[WordCache], tuple[Callable[[list[str]], tuple[TokenIds, Offsets]]]]:
        return WordCache, (self._encode_words,)  # a worker process fills its own cache

    def _clear(self) -> None:
        self._index = _WordIndex()
        self._starts: NDArray[np.int64] = np.zeros(1024, np.int64)
        self._lengths: NDArray[np.int64] = np.zeros(1024, np.int64)
        self._ids: NDArray[np.uint32] = np.zeros(4096, np.uint32)
        self._num_words = self._num_ids = self._num_chars = 0

    def lookup(self, words: Sequence[str]) -> tuple[TokenIds, NDArray[np.int64]]:
        """Returns the ids of all words one after the other, and the number of ids of each word."""
        if self._num_words > _MAX_WORDS or self._num_chars > _MAX_CHARS:
            self._clear()
        rows = np.fromiter(map(self._index.__getitem__, words), np.int64, len(words))
        if self._index.new:
            try:
                self._add(self._index.new)
            except BaseException:
                self._clear()  # the index names words that have no ids
                raise
            self._index.new = []
        lengths = self._lengths[rows]
        first = np.cumsum(lengths) - lengths
        where = np.repeat(self._starts[rows] - first, lengths)
        where += np.arange(len(where))
        return self._ids[where], lengths

    def _add(self, words: list[str]) -> None:
        ids, offsets = self._encode_words(words)
        num_words, num_ids = self._num_words + len(words), self._num_ids + len(ids)
        self._starts = _grown(self._starts, num_words)
        self._lengths = _grown(self._lengths, num_words)
        self._ids = _grown(self._ids, num_ids)
        self._starts[self._num_words : num_words] = offsets[:-1] + self._num_ids
        self._lengths[self._num_words : num_words] = np.diff(offsets)
        self._ids[self._num_ids : num_ids] = ids
        self._num_words, self._num_ids = num_words, num_ids
        self._num_chars += sum(map(len, words))


class _WordIndex(dict[str, int]):
    """Numbers words in the order in which they are first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        index = self[word] = len(self)
        self.new.append(word)
        return index


Number = TypeVar("Number", np.int64, np.uint32)


def _grown(array: NDArray[Number], size: int) -> NDArray[Number]:
    if size <= len(array):
        return array
    larger: NDArray[Number] = np.zeros(max(size, 2 * len(array)), array.dtype)
    larger[: len(array)] = array
    return larger


def pieces(text: str, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> list[str]:
    """Cuts the spans [start, end) out of a text."""
    return list(map(text.__getitem__, map(slice, starts.tolist(), ends.tolist())))


def offsets_from_counts(counts: NDArray[np.int64], bounds: NDArray[np.int64]) -> Offsets:
    """Sums the number of ids per character up to the text bounds."""
    before = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=before[1:])
    return before[bounds]
