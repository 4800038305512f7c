"""Plans over records that are samples as they stand: pairs and labelled texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tencentpretrain.data.examples import Ids
from tencentpretrain.data.processor import Plan
from tencentpretrain.data.store import IndexArray, Store


@dataclass(frozen=True, kw_only=True)
class RecordPlan(Plan):
    """One sample per record; `records` are those that fit, or None for all."""

    records: IndexArray | None = None

    def segments(self, store: Store, index: int) -> list[Ids]:
        """Returns the segments of the record of sample `index`."""
        first, last = store.record_offsets[(record := self.record(index)) : record + 2].tolist()
        return [store.segment(segment) for segment in range(first, last)]

    def lengths(self, store: Store) -> IndexArray:
        """Returns the tokens of all segments of each sample together, (size,)."""
        offsets = store.segment_offsets[store.record_offsets]
        lengths = np.diff(offsets)
        return lengths if self.records is None else lengths[self.records]

    def record(self, index: int) -> int:
        """Returns the record of sample `index`."""
        return index if self.records is None else int(self.records[index])


def plan_records(store: Store, *, longest_first: int | None = None) -> RecordPlan:
    """Plans all records, or those whose first segment has at most `longest_first` tokens."""
    if longest_first is None:
        return RecordPlan(size=len(store))
    first = store.record_offsets[:-1]
    lengths = store.segment_offsets[first + 1] - store.segment_offsets[first]
    records = np.flatnonzero(lengths <= longest_first)
    return RecordPlan(size=len(records), skipped=len(store) - len(records), records=records)
