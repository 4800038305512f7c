"""The result of one row of the reliability table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scale = Literal["ci", "full"]
"""A few faults that take seconds, or the full counts."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was promised, and what was seen.

    Fields:
        name: the row, such as "R1".
        promised: the figure that counts as held.
        reached: the figure of this run, with the counts that it rests on.
        passed: whether the promise was held.
    """

    name: str
    promised: str
    reached: str
    passed: bool
