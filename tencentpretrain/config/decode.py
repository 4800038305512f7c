"""Turns values from a file and from flags into sections, and every fault into one sentence with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tencentpretrain.config import dialect
from tencentpretrain.config.base import Section
from tencentpretrain.config.json_file import JsonFile
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.options import Option, Part, options_of, show
from tencentpretrain.registry import closest


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a value comes from. `place` is the path and line in a file, or the flag as written."""

    source: Literal["default", "file", "flag"]
    place: str = ""


DEFAULT = Origin(source="default")


@dataclass(kw_only=True)
class Values:
    """Given values under their published keys, with their origins, and all problems found so far."""

    given: dict[str, Any] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    origin: dict[str, Origin] = field(default_factory=dict)
    streams: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)

    def put(self, option: Option, spelling: str, value: Any, origin: Origin) -> None:
        """Sets a value; later ones replace earlier ones."""
        self.given[option.key] = value
        self.spelled[option.key] = spelling
        self.origin[option.key] = origin

    def place(self, key: str) -> str:
        """Returns how a message names a key: as a flag, or as a key with its line."""
        origin = self.origin.get(key, DEFAULT)
        if origin.source == "flag":
            return origin.place
        path = tuple(key.split("."))
        line = self.lines.get((*path[:-1], self.spelled.get(key, path[-1]))) or self.lines.get(path)
        return f"{key} (line {line})" if line and (origin.source == "file" or len(path) > 1) else key

    def add(self, sentence: str) -> None:
        """Adds a problem that starts with its key and a colon, putting the key's place before it."""
        key, colon, text = sentence.partition(": ")
        if colon and re.fullmatch(r"[\w.]+", key):
            sentence = f"{self.place(key)}: {text}"
        if sentence not in self.problems:
            self.problems.append(sentence)


def read_file_values(values: Values, file: JsonFile, options: Mapping[str, Option], *, strict: bool) -> None:
    """Adds the keys of a config file; unknown ones are problems, or notices if not strict."""
    values.lines = file.lines
    values.problems.extend(file.problems)
    for name, value in file.values.items():
        line = file.lines.get((name,), 0)
        if name in dialect.STREAMS:
            if isinstance(value, dict):
                values.streams[name] = value
            else:
                values.problems.append(
                    f"{name} (line {line}): is {show(value)}, but must be an object with a stream's keys"
                )
            continue
        if name in dialect.WITHOUT_EFFECT:
            values.notices.append(f"{name} (line {line}): {dialect.WITHOUT_EFFECT[name]}")
            continue
        option = options.get(name)
        if option is None:
            if name not in settings_of_package():
                said = _unknown(f"{name} (line {line})", name, options)
                inner = [key for key in value if key in options] if isinstance(value, dict) else []
                if inner:
                    said = (
                        f"{name} (line {line}): unknown key; {', '.join(inner[:3])} must stand at the top of the file"
                    )
                (values.problems if strict else values.notices).append(said)
            continue
        if option.key in values.given:
            values.problems.append(
                f"{name} (line {line}): means the same as {values.spelled[option.key]!r}; keep one of them"
            )
            continue
        values.put(option, name, value, Origin(source="file", place=f"{file.path}:{line}"))


def decode(part: Part, values: Values) -> tuple[Section, bool]:
    """Builds a section from the given values.

    Returns the section, with defaults in place of values that are wrong, and whether it is complete and right.
    """
    inside: dict[str, Any] = {}
    by_field: dict[str, Option] = {}
    for option in options_of(part):
        by_field[option.field] = option
        if option.key in values.given:
            inside[option.field] = option.inside(values.spelled[option.key], values.given[option.key])
    section, wrong = _validate(part.section, inside, by_field, values, "")
    if part.section is ModelConfig and values.streams and isinstance(section, ModelConfig):
        streams = []
        for name in dialect.STREAMS:
            if name not in values.streams:
                values.problems.append(f"{name}: is missing; a two-stream model needs stream_0 and stream_1")
                wrong = True
                continue
            stream, bad = _decode_stream(name, values.streams[name], inside, by_field, values)
            streams.append(stream)
            wrong = wrong or bad
        if len(streams) == len(dialect.STREAMS):
            section = section.model_copy(update={"streams": tuple(streams)})
    return section, not wrong


def _decode_stream(
    name: str, given: Mapping[str, Any], outer: Mapping[str, Any], by_field: Mapping[str, Option], values: Values
) -> tuple[Section, bool]:
    """Builds a stream's settings: the outer ones overlaid with the stream's own."""
    spellings = {spelling: option for option in by_field.values() for spelling in option.spellings}
    inside = dict(outer)
    wrong = False
    for key, value in given.items():
        place = values.place(f"{name}.{key}")
        if key in dialect.WITHOUT_EFFECT:
            values.notices.append(f"{place}: {dialect.WITHOUT_EFFECT[key]}")
        elif key in spellings:
            inside[spellings[key].field] = spellings[key].inside(key, value)
        else:
            hint = "" if key not in settings_of_package() else "; it is not a setting of a stream"
            values.problems.append(_unknown(place, key, spellings) if not hint else f"{place}: unknown key{hint}")
            wrong = True
    section, bad = _validate(ModelConfig, inside, by_field, values, f"{name}.", own=set(given))
    return section, wrong or bad


def _validate(
    kind: type[Section],
    inside: Mapping[str, Any],
    by_field: Mapping[str, Option],
    values: Values,
    prefix: str,
    own: set[str] | None = None,
) -> tuple[Section, bool]:
    inside = dialect.rewrite(inside)
    try:
        return kind.model_validate_json(json.dumps(inside), strict=True), False
    except ValidationError as error:
        faults = error.errors(include_url=False)
    for fault in faults:
        option = by_field[str(fault["loc"][0])]
        key = option.key
        if own is not None and not own & set(option.spellings):
            continue  # the outer settings' own fault, already reported
        if fault["type"] == "missing" and len(fault["loc"]) == 1:
            origin = f"--{key}: is required: {option.text}" if option.flag else f"{key}: is required: {option.text}"
            values.problems.append(origin)
        elif len(fault["loc"]) > 1 and option.base is dict:
            nested = ".".join(str(item) for item in (prefix + key, *fault["loc"][1:]))
            values.add(f"{nested}: {_nested_sentence(dict(fault))}")
        else:
            value = fault["input"] if len(fault["loc"]) > 1 else option.outside(inside[option.field])
            values.add(f"{prefix}{key}: {_sentence(option, value, item=len(fault['loc']) > 1)}")
    bad = {str(fault["loc"][0]) for fault in faults}
    right = {name: value for name, value in inside.items() if name not in bad}
    missing = {name for name, info in kind.model_fields.items() if info.is_required() and name not in right}
    if missing:
        return kind.model_construct(**right, **dict.fromkeys(missing)), True
    return kind.model_validate_json(json.dumps(right), strict=True), True


def _sentence(option: Option, value: Any, *, item: bool) -> str:
    kind = {str: "a string", bool: "a boolean", list: "a list", dict: "an object", int: "", float: ""}.get(
        type(value), ""
    )
    kind = f" ({kind})" if kind and not option.choices else ""
    near = closest(value, option.choices) if isinstance(value, str) and option.choices else None
    hint = f"; did you mean {near!r}?" if near else ""
    where = "holds" if item else "is"
    return f"{where} {show(value)}{kind}, but must be {option.expected}{hint}"


def _nested_sentence(fault: dict[str, Any]) -> str:
    if fault["type"] == "missing":
        return "is required"
    if fault["type"] == "extra_forbidden":
        return "unknown key"
    return f"is {show(fault['input'])}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def _unknown(place: str, name: str, options: Mapping[str, Option]) -> str:
    near = dialect.FOREIGN_WORDS.get(name) or closest(name, [*options, *dialect.STREAMS])
    return f"{place}: unknown key" + (f"; did you mean {near!r}?" if near else "; --help lists what a config may set")


_SETTINGS: list[frozenset[str]] = []


def settings_of_package() -> frozenset[str]:
    """Returns the keys of all commands, read from the sources, so that one file can serve several commands."""
    if not _SETTINGS:
        package = Path(__file__).resolve().parents[1]
        found = {"config_path", "config_strict"}
        for path in (*package.glob("config/*.py"), *package.glob("*/config.py")):
            fields = re.findall(r"^    (\w+): [^\n]+ = setting\(", path.read_text(encoding="utf-8"), re.MULTILINE)
            found.update(fields, map(dialect.published, fields), (f"tgt_{name}" for name in fields))
        _SETTINGS.append(frozenset(found))
    return _SETTINGS[0]
