"""The fields of a run's sections as options: one table that flags, JSON keys, help and export read."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tencentpretrain.config import dialect
from tencentpretrain.config.base import Section


@dataclass(frozen=True, kw_only=True)
class Part:
    """A section of a run under its name in `RunConfig`.

    Args:
        name: attribute of the run.
        section: the class.
        prefix: put before each key, for a second value of the same class (`tgt_`).
        only_for: (key, values): the section counts only in runs where the key has one of the values.
    """

    name: str
    section: type[Section]
    prefix: str = ""
    only_for: tuple[str, frozenset[str]] | None = None


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field, as a user sees it."""

    part: Part
    field: str
    key: str
    """Published spelling."""
    inverted: bool
    default: Any
    """In the published sense; None if there is none."""
    required: bool
    base: type
    """int, float, bool, str or dict."""
    many: bool
    optional: bool
    choices: tuple[str, ...]
    topic: str
    text: str
    flag: bool
    bounds: Mapping[str, float]

    @property
    def spellings(self) -> tuple[str, ...]:
        """The words a user may write; the published one first."""
        inside = self.part.prefix + self.field
        taken = inside in dialect.WITHOUT_EFFECT and inside != self.key
        return (self.key,) if taken or inside == self.key else (self.key, inside)

    def inside(self, spelling: str, value: Any) -> Any:
        """Returns the field's value for a value given under a spelling."""
        if self.inverted and spelling == self.key and isinstance(value, bool):
            return not value
        return dialect.normalise(self.field, value, many=self.many)

    def outside(self, value: Any) -> Any:
        """Returns the value under the published spelling for a field's value."""
        return (not value) if self.inverted and isinstance(value, bool) else value

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            kind = "one of " + ", ".join(self.choices)
        else:
            kind = {int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "an object"}[
                self.base
            ]
            limits = [f"{_BOUND_WORDS[name]} {limit:g}" for name, limit in self.bounds.items()]
            kind += f" {' and '.join(limits)}" if limits else ""
        return f"a list, each item {kind}" if self.many else kind


_BOUND_WORDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


def options_of(part: Part) -> list[Option]:
    """Lists the fields of a section."""
    return [_option(part, name, info) for name, info in part.section.model_fields.items() if name != "streams"]


def options_by_spelling(parts: Iterable[Part]) -> dict[str, Option]:
    """Maps every accepted spelling to its option. The first part that declares a key owns it."""
    table: dict[str, Option] = {}
    for part in parts:
        for option in options_of(part):
            for spelling in option.spellings:
                table.setdefault(spelling, option)
    return table


def show(value: Any) -> str:
    """Writes a value as it would stand in a JSON file."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _option(part: Part, name: str, info: FieldInfo) -> Option:
    base, many, optional, choices = _shape(info.annotation)
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    key = part.prefix + dialect.published(name)
    if part.prefix and name == part.prefix.rstrip("_"):
        key = part.prefix + name
    inverted = key in dialect.INVERTED
    default = None if info.default is PydanticUndefined else info.default
    bounds = {
        bound: getattr(item, bound)
        for item in info.metadata
        for bound in ("ge", "gt", "le", "lt")
        if hasattr(item, bound)
    }
    return Option(
        part=part,
        field=name,
        key=key,
        inverted=inverted,
        default=(not default) if inverted else default,
        required=info.is_required(),
        base=base,
        many=many,
        optional=optional,
        choices=choices,
        topic=("target " if part.prefix else "") + (str(extra.get("topic") or part.name)),
        text=info.description or "",
        flag=bool(extra.get("cli", True)),
        bounds=bounds,
    )


def _shape(annotation: Any) -> tuple[type, bool, bool, tuple[str, ...]]:
    """Returns (item type, is a list, may be null, allowed values) of a field's annotation."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Union or str(origin) == "<class 'types.UnionType'>":
        inner = next(item for item in arguments if item is not type(None))
        base, many, _, choices = _shape(inner)
        return base, many, True, choices
    if origin is tuple:
        base, _, _, choices = _shape(arguments[0])
        return base, True, False, choices
    if origin is Literal:
        return str, False, False, tuple(str(item) for item in arguments)
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, Section)):
        return dict, False, False, ()
    return annotation, False, False, ()
