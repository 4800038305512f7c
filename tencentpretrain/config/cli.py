"""One command line: its sections as flags, a config file, and all problems at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from tencentpretrain.config.base import Section, setting
from tencentpretrain.config.decode import DEFAULT, Origin, Values, decode, read_file_values
from tencentpretrain.config.flags import read_flags
from tencentpretrain.config.help import help_text
from tencentpretrain.config.json_file import read_json
from tencentpretrain.config.options import Option, Part, options_by_spelling, options_of
from tencentpretrain.errors import ConfigError

S = TypeVar("S", bound=Section)
BASE_CONFIG = "models/bert/base_config.json"


class ConfigFileConfig(Section):
    """Where settings are read from."""

    config_path: str | None = setting(
        None, "JSON file of settings; relative paths also below the shipped models", topic="config"
    )
    config_strict: bool = setting(True, "an unknown key is an error; false: a warning", topic="config")


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """The sections of one run.

    Args:
        sections: by the name of their part.
        origin: published key -> where its value comes from; keys at their default are in it too.
        config_path: the config file that was read.
        notices: what a user should know though it stops nothing.
        unsound: names of sections in which something is wrong (only seen by checks, before the error).
    """

    sections: Mapping[str, Section]
    origin: Mapping[str, Origin]
    config_path: str | None = None
    notices: tuple[str, ...] = ()
    unsound: frozenset[str] = field(default_factory=frozenset)
    parts: tuple[Part, ...] = ()

    def get(self, section: type[S], name: str | None = None) -> S:
        """Returns the section of a class; `name` chooses between several."""
        for key, value in self.sections.items():
            if isinstance(value, section) and name in (None, key):
                return value
        raise KeyError(name or section.__name__)

    def given(self, key: str) -> bool:
        """Whether a published key was set in the file or by a flag."""
        return self.origin.get(key, DEFAULT).source != "default"


Check = Callable[[Parsed], Iterator[str]]
Defaults = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def part_of(section: type[Section] | Part) -> Part:
    """Returns a section as a part named after its class: TrainConfig -> train."""
    return (
        section
        if isinstance(section, Part)
        else Part(name=section.__name__.removesuffix("Config").lower(), section=section)
    )


def parse_sections(
    prog: str,
    description: str,
    sections: Sequence[type[Section] | Part],
    argv: Sequence[str] | None = None,
    *,
    examples: Sequence[str] = (),
    config_file: str | None = BASE_CONFIG,
    config_required: bool = False,
    checks: Sequence[Check] = (),
    notices: Sequence[Check] = (),
    defaults: Defaults | None = None,
) -> Parsed:
    """Reads a command line and its config file into sections.

    Args:
        config_file: default of --config_path; None: no file unless one is given.
        config_required: --config_path must be given.
        checks: yield contradictions between sections, each "key: sentence".
        notices: yield what should be said though it stops nothing.
        defaults: returns further defaults, by key or field, from the given values by published key.

    Raises:
        ConfigError: with every problem of flags, file, sections and checks.
        SystemExit: after --help or --version.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    default = None if config_required else config_file
    _answer(prog, description, _with_file(sections), argv, examples, default)
    parsed, problems = read_sections(
        sections,
        argv,
        config_file=default,
        config_required=config_required,
        checks=checks,
        notices=notices,
        defaults=defaults,
    )
    if problems:
        raise ConfigError(problems, source=parsed.config_path or prog)
    return parsed


def read_sections(
    sections: Sequence[type[Section] | Part],
    argv: Sequence[str],
    *,
    config_file: str | None = BASE_CONFIG,
    config_required: bool = False,
    checks: Sequence[Check] = (),
    notices: Sequence[Check] = (),
    defaults: Defaults | None = None,
) -> tuple[Parsed, tuple[str, ...]]:
    """Does the work of `parse_sections`; returns the sections, wrong values left out, and the problems."""
    parts = _with_file(sections)
    options = options_by_spelling(parts)
    flags = read_flags(options, [token for token in argv if token != "--debug"])
    values = Values(problems=list(flags.problems))
    strict = flags.values.get("config_strict", ("", True))[1]
    path = flags.values.get("config_path", ("", config_file))[1]
    readable = True
    if path is not None:
        try:
            read_file_values(values, read_json(path), options, strict=strict)
        except ConfigError as error:
            values.problems.extend(error.problems)
            readable = False
    elif config_required:
        values.problems.append("--config_path: is required: the JSON file of the model")
    for key, (spelling, value) in flags.values.items():
        values.put(options[spelling], spelling, value, Origin(source="flag", place=f"--{key}"))

    for name, value in (defaults(values.given) if defaults else {}).items():
        if options[name].key not in values.given:
            values.put(options[name], name, value, DEFAULT)

    parsed = _decode_all(parts, values, path)
    if readable:
        _check_sections(parsed, values)
        for check in checks:
            for sentence in check(parsed):
                values.add(sentence)
        for notice in notices:
            values.notices.extend(notice(parsed))
    return replace(parsed, notices=tuple(values.notices)), tuple(values.problems)


def _with_file(sections: Sequence[type[Section] | Part]) -> tuple[Part, ...]:
    return (*map(part_of, sections), Part(name="file", section=ConfigFileConfig))


def _check_sections(parsed: Parsed, values: Values) -> None:
    for part in parsed.parts:
        if part.only_for and str(values.given.get(part.only_for[0])) not in part.only_for[1]:
            continue
        if part.name not in parsed.unsound:
            for sentence in parsed.sections[part.name].problems():
                values.add(part.prefix + sentence if not sentence.startswith(part.prefix) else sentence)


def _decode_all(parts: Sequence[Part], values: Values, path: str | None) -> Parsed:
    sections: dict[str, Section] = {}
    unsound = set()
    for part in parts:
        sections[part.name], sound = decode(part, values)
        if not sound:
            unsound.add(part.name)
    origin = {option.key: values.origin.get(option.key, DEFAULT) for part in parts for option in options_of(part)}
    return Parsed(sections=sections, origin=origin, config_path=path, unsound=frozenset(unsound), parts=tuple(parts))


def _answer(
    prog: str,
    description: str,
    parts: Sequence[Part],
    argv: Sequence[str],
    examples: Sequence[str],
    config_file: str | None,
) -> None:
    """Answers --help and --version."""
    if "--help" in argv or "-h" in argv:
        unique: dict[str, Option] = {}
        for option in (option for part in (parts[-1], *parts[:-1]) for option in options_of(part)):
            if option.key not in unique or (option.required and not unique[option.key].required):
                unique[option.key] = option
        text = help_text(prog, description, unique.values(), examples)
        if config_file:
            text = text.replace("below the shipped models)", f"below the shipped models (default {config_file})", 1)
        sys.stdout.write(text)
        raise SystemExit(0)
    if "--version" in argv:
        from importlib.metadata import version

        print(f"tencentpretrain {version('tencentpretrain')}")
        raise SystemExit(0)
