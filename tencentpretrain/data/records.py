"""How lines become records: documents of sentences, lines, pairs, labelled texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tencentpretrain.data.corpus import Chunk

Layout = Literal["sentences", "lines", "pairs", "labelled"]
"""What a record is: a document of sentences, one text, two texts, or one or two texts with a class."""

RecordFormat = Literal["sentences", "lines", "json_lines", "tsv_pairs", "instructions", "labelled"]
"""How a corpus spells its records."""

LAYOUT_OF: dict[str, Layout] = {
    "sentences": "sentences",
    "lines": "lines",
    "json_lines": "lines",
    "tsv_pairs": "pairs",
    "instructions": "pairs",
    "labelled": "labelled",
}


@dataclass(kw_only=True)
class ParsedLines:
    """The texts of some lines, ready to be tokenised.

    Attributes:
        texts: all segments one after the other.
        segments: segments per finished record; the last ones of `texts` may belong to a document still open.
        labels: one per record, where the layout has labels.
        line_of: the line each text stands in, where a text without tokens makes the line unusable; else empty.
        blank: how many lines were blank.
    """

    texts: list[str] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    line_of: list[int] = field(default_factory=list)
    blank: int = 0


class LineFault(ValueError):
    """A line does not have the promised form; the text is the reason."""


def parse_lines(record_format: RecordFormat, chunk: Chunk) -> ParsedLines:
    """Parses the usable lines of a chunk and adds a reason to `chunk.faults` for each that has the wrong form."""
    if record_format == "sentences":
        return _parse_sentences(chunk)
    if record_format == "lines":
        texts = [line for line in chunk.lines if line is not None]
        return ParsedLines(texts=texts, segments=[1] * len(texts), blank=texts.count(""))
    return _parse_fields(chunk, _PARSERS[record_format])


def _parse_sentences(chunk: Chunk) -> ParsedLines:
    parsed = ParsedLines()
    open_sentences = 0
    for line in chunk.lines:
        if line:
            parsed.texts.append(line)
            open_sentences += 1
        elif line is not None:
            parsed.segments.append(open_sentences)
            open_sentences = 0
            parsed.blank += 1
    return parsed


def _parse_fields(chunk: Chunk, parse: Callable[[str], tuple[list[str], int | None]]) -> ParsedLines:
    parsed = ParsedLines()
    for index, line in enumerate(chunk.lines):
        if line is None:
            continue
        if not line:
            parsed.blank += 1
            continue
        try:
            texts, label = parse(line)
        except LineFault as fault:
            chunk.faults[index] = str(fault)
            continue
        parsed.texts += texts
        parsed.segments.append(len(texts))
        parsed.line_of += [index] * len(texts)
        if label is not None:
            parsed.labels.append(label)
    return parsed


def _parse_pair(line: str) -> tuple[list[str], None]:
    columns = line.split("\t")
    if len(columns) != 2:
        raise LineFault(f"wrong number of columns: {len(columns)} between tabs instead of 2")
    return columns, None


def _parse_labelled(line: str) -> tuple[list[str], int]:
    label, *texts = line.split("\t")
    if len(texts) not in (1, 2):
        raise LineFault(
            f"wrong number of columns: {len(texts) + 1} between tabs instead of 2 or 3 (label, text, second text)"
        )
    try:
        number = int(label)
    except ValueError:
        raise LineFault(f"label is not a whole number: {label[:40]!r}") from None
    if not 0 <= number < 2**31:
        raise LineFault(f"label is negative or too large: {number}")
    return texts, number


def _parse_json_text(line: str) -> tuple[list[str], None]:
    content = _parse_object(line)
    if "text" not in content:
        raise LineFault("JSON key is missing: 'text'")
    return [_string(content, "text")], None


def _parse_instruction(line: str) -> tuple[list[str], None]:
    content = _parse_object(line)
    if not content.keys() & {"instruction", "input", "output"}:
        raise LineFault("JSON key is missing: 'instruction', 'input' or 'output'")
    prompt = _string(content, "instruction") + _string(content, "input")
    answer = _string(content, "output")
    # Published instruction files spell line breaks as the two characters backslash and n.
    return [prompt.replace("\\n", "\n"), answer.replace("\\n", "\n")], None


def _parse_object(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line, object_pairs_hook=_unique_keys)
    except ValueError as error:
        if isinstance(error, LineFault):
            raise
        raise LineFault(f"not JSON: {error}") from None
    except RecursionError:
        raise LineFault("not JSON: nested too deeply") from None
    if not isinstance(content, dict):
        raise LineFault(f"not a JSON object: {type(content).__name__}")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise LineFault(f"JSON key stands twice: {next(key for key in keys if keys.count(key) > 1)[:40]!r}")
    return content


def _string(content: dict[str, Any], key: str) -> str:
    value = content.get(key, "")
    if not isinstance(value, str):
        raise LineFault(f"JSON value is not a string: {key!r}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise LineFault(f"half a surrogate pair: in the value of {key!r}") from None
    return value


_PARSERS: dict[str, Callable[[str], tuple[list[str], int | None]]] = {
    "json_lines": _parse_json_text,
    "tsv_pairs": _parse_pair,
    "instructions": _parse_instruction,
    "labelled": _parse_labelled,
}
