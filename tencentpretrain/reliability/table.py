"""Runs rows of the table. A row is a function `check(scale, folder) -> Row` under `@ROWS.register("R1")`."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tencentpretrain.data.durable import to_json, write_durably
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability.row import Row, Scale

Check = Callable[[Scale, Path], Row]

_HEAD = ("row", "promised", "reached", "held")


def names() -> tuple[str, ...]:
    """Returns all rows in the order of the table: R1, R2, ... R10, D1."""
    return tuple(sorted(ROWS.names(), key=_place))


def run_rows(chosen: Iterable[str], scale: Scale) -> Iterator[tuple[Row, float]]:
    """Runs rows, each in a folder of its own that is removed afterwards; yields each with its seconds.

    A check that raises is a row that was not held.
    """
    logging.getLogger("tencentpretrain").addHandler(logging.NullHandler())  # a row says itself what was wrong
    for name in chosen:
        folder = Path(tempfile.mkdtemp(prefix=f"reliability-{name}-"))
        began = time.monotonic()
        try:
            row = check(name, scale, folder)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            row = Row(name=name, promised="to be checked to its end", reached=reason, passed=False)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        yield row, time.monotonic() - began


def check(name: str, scale: Scale, folder: Path) -> Row:
    """Runs one row in an empty folder."""
    found: Check = ROWS.get(name)
    return found(scale, folder)


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns recorded rows as a table."""
    lines = [f"| {' | '.join(_HEAD)} |", "|---|---|---|---|"]
    for name in sorted(rows, key=_place):
        row = rows[name]
        cells = (name, row["promised"], row["reached"], "yes" if row["passed"] else "**no**")
        lines.append(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def record(path: Path, row: Row, scale: Scale, seconds: float) -> None:
    """Puts a row in a JSON file of results; the other rows stay."""
    rows = recorded(path)
    rows[row.name] = {
        "promised": row.promised,
        "reached": row.reached,
        "passed": row.passed,
        "scale": scale,
        "seconds": round(seconds, 1),
    }
    write_durably(path, to_json({name: rows[name] for name in sorted(rows, key=_place)}))


def recorded(path: Path) -> dict[str, Any]:
    """Returns the rows of a JSON file of results; none if it does not exist.

    Raises:
        ConfigError: it is another file.
    """
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {name: rows[name] for name in rows if {"promised", "reached", "passed"} <= set(rows[name])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: is not a file of reliability figures ({error})") from None


def put_table(page: Path, content: str) -> None:
    """Replaces the table between the marks of a page.

    Raises:
        ConfigError: the page cannot be read, or lacks the marks.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{page}: is not a page of text ({error})") from None
    begin, end = "<!-- figures -->\n", "<!-- end of figures -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ConfigError(f"{page}: lacks the marks {begin.strip()} and {end}")
    page.write_text(before + begin + content + end + after, encoding="utf-8")


def _place(name: str) -> tuple[int, str, int]:
    letter, number = re.match(r"([A-Za-z]*)(\d*)", name).groups()  # type: ignore[union-attr]
    order = "RDINPCS"
    return (order.find(letter) if letter in order else len(order), letter, int(number or 0))
