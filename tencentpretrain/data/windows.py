"""Plans that cut documents, or documents packed back to back, into windows of equal length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.examples import Ids
from tencentpretrain.data.processor import Plan
from tencentpretrain.data.store import IndexArray, Store


@dataclass(frozen=True, kw_only=True)
class WindowPlan(Plan):
    """Windows over a stream of documents, each wrapped in CLS and SEP if `wrapped`.

    Attributes:
        width: tokens per window.
        documents: (documents, 2) first and last + 1 token of each document in the store.
        stream: (documents + 1,) where each document begins in the stream.
        groups: (groups + 1,) positions in the stream that no window crosses.
        first_window: (groups + 1,) the windows before each group.
    """

    width: int
    wrapped: bool
    documents: IndexArray
    stream: IndexArray
    groups: IndexArray
    first_window: IndexArray

    def bounds(self, index: int) -> tuple[int, int]:
        """Returns where one window begins and ends in the stream."""
        group = int(np.searchsorted(self.first_window, index, side="right")) - 1
        begin = int(self.groups[group]) + self.width * (index - int(self.first_window[group]))
        return begin, min(begin + self.width, int(self.groups[group + 1]))

    def lengths(self) -> IndexArray:
        """Returns the tokens of every window, (size,)."""
        group = np.repeat(np.arange(len(self.groups) - 1), np.diff(self.first_window))
        begin = self.groups[group] + self.width * (np.arange(self.size) - self.first_window[group])
        return np.minimum(self.width, self.groups[group + 1] - begin)

    def document_lengths(self, index: int) -> tuple[int, ...]:
        """Returns how many tokens of one window belong to each of its documents."""
        begin, end = self.bounds(index)
        first, last = np.searchsorted(self.stream, [begin, end], side="right")
        edges = np.concatenate([[begin], self.stream[first:last], [end]])
        lengths = np.diff(edges)
        return tuple(lengths[lengths > 0].tolist())

    def window(self, store: Store, index: int, *, cls_id: int, sep_id: int) -> Ids:
        """Returns the tokens of one window: `width` of them, fewer at the end of a group."""
        begin, end = self.bounds(index)
        ids = np.empty(end - begin, np.int64)
        document = int(np.searchsorted(self.stream, begin, side="right")) - 1
        position = begin
        while position < end:
            first = int(self.documents[document, 0])
            start, stop = int(self.stream[document]), int(self.stream[document + 1])
            if self.wrapped and position == start:
                ids[position - begin] = cls_id
                position += 1
            text_start = start + self.wrapped
            text_stop = min(stop - self.wrapped, end)
            if position < text_stop:
                offset = first - text_start
                ids[position - begin : text_stop - begin] = store.tokens(position + offset, text_stop + offset)
                position = text_stop
            if self.wrapped and position < end and position == stop - 1:
                ids[position - begin] = sep_id
                position += 1
            document += 1
        return ids


def plan_windows(
    store: Store, width: int, *, wrapped: bool, packed: int | None, drop_tail: bool, keep_blank: bool
) -> WindowPlan:
    """Plans windows over all documents of a store.

    Args:
        packed: None to cut each document by itself, else how many documents are packed together; 0 for all.
        drop_tail: leave out a group's last window if it is not full.
        keep_blank: an empty record is a document without text; else it is left out.
    """
    offsets = store.segment_offsets[store.record_offsets]
    documents = np.stack([offsets[:-1], offsets[1:]], axis=1)
    if not keep_blank:
        documents = documents[documents[:, 0] < documents[:, 1]]
    stream = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(documents[:, 1] - documents[:, 0] + 2 * wrapped, out=stream[1:])
    if packed is None:
        groups = stream
    elif packed == 0:
        groups = stream[[0, -1]]
    else:
        groups = np.append(stream[:-1:packed], stream[-1])
    lengths = np.diff(groups)
    first_window = np.zeros(len(groups), np.int64)
    np.cumsum(lengths // width if drop_tail else -(-lengths // width), out=first_window[1:])
    return WindowPlan(
        size=int(first_window[-1]),
        width=width,
        wrapped=wrapped,
        documents=documents,
        stream=stream,
        groups=groups,
        first_window=first_window,
    )


def plan_masked_windows(store: Store, data: DataConfig) -> WindowPlan:
    """Plans the windows that `mlm` and `t5` corrupt: CLS text SEP, each document alone or a buffer of them packed."""
    return plan_windows(
        store,
        data.seq_length,
        wrapped=True,
        packed=data.docs_buffer_size if data.full_sentences else None,
        drop_tail=False,
        keep_blank=data.keep_blank_lines,
    )
