"""Reads a command line against a table of options.

argparse stops at its first problem and knows one spelling of a word; here all problems come back at once, each with
the nearest flag.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tencentpretrain.config import dialect
from tencentpretrain.config.options import Option
from tencentpretrain.registry import closest

_TRUE_FALSE = {"true": True, "false": False}


@dataclass(kw_only=True)
class GivenFlags:
    """What a command line says.

    `values` maps a published key to (spelling, value in JSON types); `problems` start with the flag they are about.
    """

    values: dict[str, tuple[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_flags(options: Mapping[str, Option], argv: Sequence[str]) -> GivenFlags:
    """Reads `--key value`, `--key=value`, `--flag`, `--no-flag`, abbreviations, and lists by spaces or commas."""
    given = GivenFlags()
    known = {name: option for name, option in options.items() if option.flag}
    for word, words in _groups(argv, given.problems):
        name, negated, problem = _resolve(word, known)
        if problem:
            given.problems.append(problem)
            continue
        option = known[name]
        try:
            value = _value(option, words, negated)
        except ValueError as error:
            given.problems.append(f"--{word}: {error}")
            continue
        given.values[option.key] = (name, value)
    return given


def _groups(argv: Sequence[str], problems: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields each flag's word with the words after it."""
    word: str | None = None
    words: list[str] = []
    for token in argv:
        if token.startswith("--") and len(token) > 2:
            if word is not None:
                yield word, words
            word, equals, value = token[2:].partition("=")
            words = [value] if equals else []
        elif word is None:
            problems.append(f"{token}: unexpected; every setting is a flag, such as --config_path {token}")
        else:
            words.append(token)
    if word is not None:
        yield word, words


def _resolve(word: str, known: Mapping[str, Option]) -> tuple[str, bool, str]:
    """Returns (accepted spelling, whether it was negated, problem)."""
    if word in known:
        return word, False, ""
    for prefix in ("no-", "no_"):
        rest = word.removeprefix(prefix)
        if rest != word and rest in known and known[rest].base is bool:
            return rest, True, ""
    longer = [name for name in known if name.startswith(word)]
    if len({known[name].key for name in longer}) == 1:
        return longer[0], False, ""
    if len(longer) > 1:
        return (
            "",
            False,
            f"--{word}: could be any of {', '.join('--' + name for name in sorted(longer)[:6])}; write one out",
        )
    negatives = [f"no-{name}" for name, option in known.items() if option.base is bool and option.default]
    near = dialect.FOREIGN_WORDS.get(word) or closest(word, [*known, *negatives])
    return (
        "",
        False,
        f"--{word}: unknown flag" + (f"; did you mean '--{near}'?" if near else "; --help lists all flags"),
    )


def _value(option: Option, words: list[str], negated: bool) -> Any:
    if option.base is bool:
        if not words:
            return not negated
        if len(words) == 1 and words[0].lower() in _TRUE_FALSE:
            return _TRUE_FALSE[words[0].lower()] != negated
        raise ValueError(f"takes no value, or true or false, but has {' '.join(words)!r}")
    if option.many:
        items = [item for word in words for item in word.split(",") if item]
        if not items and option.default != ():
            raise ValueError("needs at least one value")
        return [_scalar(option, item) for item in items]
    if not words:
        raise ValueError(f"needs a value: {option.expected}")
    if len(words) > 1:
        raise ValueError(f"takes one value, but has {len(words)}: {' '.join(words)}")
    if option.optional and words[0] == "none" and not option.key.endswith("_path"):
        return None
    return _scalar(option, words[0])


def _scalar(option: Option, word: str) -> Any:
    if option.base is str:
        return word
    try:
        return int(word) if option.base is int else float(word)
    except ValueError:
        raise ValueError(f"is {word!r}, but must be {option.expected}") from None
