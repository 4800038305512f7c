"""The result of one recorded case."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """How one case compares with its record."""

    name: str
    passed: bool
    deviation: float
    detail: str = ""
