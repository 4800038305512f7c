"""The base of every configuration section: typed, frozen, keyword-only, closed to unknown keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """One part of a run's configuration.

    Fields carry their help text as `description`. A section lists every contradiction it can see by itself in
    `problems`; contradictions between sections are found by `config.run.problems`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())

    def problems(self) -> Iterator[str]:
        """Yields one sentence per contradiction, each starting with the published key it is about."""
        yield from ()


def setting(default: Any = ..., text: str = "", *, topic: str = "", cli: bool = True, **constraints: Any) -> Any:
    """Declares a field with its help text, the help topic it is listed under and its bounds (`ge`, `gt`, `le`)."""
    return Field(default, description=text, json_schema_extra={"topic": topic, "cli": cli}, **constraints)
