"""Tables of tab-separated text: UTF-8, column names in the first row in any order, no quoting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tencentpretrain.errors import DataFormatError
from tencentpretrain.registry import nearest
from tencentpretrain.sniff import describe_file

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text by column name.

    Fields:
        path: the file.
        columns: names in the order of the file.
        rows: fields of each row, as many as there are columns.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def has(self, column: str) -> bool:
        """Says whether there is a column of that name."""
        return column in self.columns

    def column(self, name: str) -> list[str]:
        """Returns the fields of one column."""
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def where(self, row: int) -> str:
        """Returns "file:line" of a row for messages."""
        return f"{self.path}:{row + 2}"


def read_table(path: str | Path, *, required: Sequence[str]) -> Table:
    """Reads a table whole.

    Lines end with LF or CRLF; a byte-order mark is taken off. Blank lines at the end are not rows, except in a table
    of one column, where a row may be empty.

    Raises:
        DataFormatError: the file is missing, empty, not UTF-8, lacks a column or has rows of another length.
    """
    path = Path(path)
    lines = read_lines(path)
    if not lines:
        raise DataFormatError(f"{path}: the file is empty; it needs a first row with column names")
    columns = tuple(lines[0].split("\t"))
    _check_columns(path, columns, required)
    if len(columns) > 1:
        while len(lines) > 1 and not lines[-1]:
            lines.pop()
    rows = tuple(tuple(line.split("\t")) for line in lines[1:])
    wrong = [index for index, row in enumerate(rows) if len(row) != len(columns)]
    if wrong:
        shown = [f"  {path}:{index + 2}: {len(rows[index])} fields" for index in wrong[:_SHOWN]]
        more = [f"  ... and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise DataFormatError(
            "\n".join(
                [
                    f"{path}: {len(wrong)} of {len(rows)} rows do not have the {len(columns)} fields "
                    f"({', '.join(columns)}) of the first row; fields are separated by one tab and hold none",
                    *shown,
                    *more,
                ]
            )
        )
    if not rows:
        raise DataFormatError(f"{path}: there are column names, but no rows")
    return Table(path=path, columns=columns, rows=rows)


def read_lines(path: str | Path) -> list[str]:
    """Reads the lines of a text without their ends; a byte-order mark is taken off.

    Raises:
        DataFormatError: the file is missing or not UTF-8.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataFormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        seems = describe_file(path)
        raise DataFormatError(
            f"{path}:{line}: not UTF-8 text{f'; this is {seems}' if seems else ''}; convert it to UTF-8"
        ) from error
    if "\n" not in text and "\r" in text:
        text = text.replace("\r", "\n")
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.rstrip("\r") for line in lines]


def _check_columns(path: Path, columns: tuple[str, ...], required: Sequence[str]) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataFormatError(f"{path}:1: column {twice[0]!r} stands twice in the first row")
    missing = [name for name in required if name not in columns]
    if not missing:
        return
    seems = describe_file(path)
    if seems:
        raise DataFormatError(f"{path}: this is {seems}, not a tab-separated table")
    hint = "".join(nearest(name, columns) for name in missing[:1])
    found = ", ".join(repr(name if len(name) <= 40 else name[:40] + "...") for name in columns[:6])
    if len(columns) == 1 and "," in columns[0]:
        hint += "; fields are separated by tabs, not commas"
    elif not any(name.isidentifier() for name in columns):
        hint += "; the first row must hold the column names"
    raise DataFormatError(f"{path}:1: column {', '.join(missing)} is missing; the first row has {found}{hint}")
