"""A DeepSpeed JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSettings:
    stage: int
    values: Mapping[str, Any] = field(default_factory=dict)
