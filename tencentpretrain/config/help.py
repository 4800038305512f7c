"""Writes a command's help: flags by topic with defaults and allowed values, examples at the bottom."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence

from tencentpretrain.config.options import Option, show

_INDENT = 36


def help_text(prog: str, description: str, options: Iterable[Option], examples: Sequence[str] = ()) -> str:
    """Returns the text of `--help`."""
    width = max(80, min(shutil.get_terminal_size().columns, 132))
    lines = [f"usage: {prog} [--flag value ...]", "", *textwrap.wrap(description, width), ""]
    topics: dict[str, list[Option]] = {}
    for option in options:
        if option.flag:
            topics.setdefault(option.topic, []).append(option)
    for topic, members in topics.items():
        lines.append(f"{topic}:")
        for option in members:
            lines.extend(_entry(option, width))
        lines.append("")
    lines += [
        "common:",
        *_columns("--help, --version", "this text; the version", width),
        *_columns("--debug", "show the traceback of an error", width),
        "",
        "A config file may set any of these. Precedence: default < config file < flag. --key=value works too.",
    ]
    if examples:
        lines += ["", "examples:", *(f"  {example}" for example in examples)]
    return "\n".join(lines) + "\n"


def _entry(option: Option, width: int) -> list[str]:
    word = {int: "INT", float: "NUMBER", bool: "", str: "TEXT", dict: ""}[option.base]
    if option.key.endswith("_path"):
        word = "PATH"
    if option.many:
        word += " ..."
    remarks = []
    if option.choices:
        remarks.append("one of " + ", ".join(option.choices))
    if option.required:
        remarks.append("required")
    elif option.base is bool:
        remarks.append("on by default" if option.default else "")
    elif option.default is not None and option.default != ():
        default = option.default
        remarks.append(
            "default " + (" ".join(map(str, default)) if isinstance(default, tuple) else show(default).strip('"'))
        )
    text = option.text + (f" ({'; '.join(filter(None, remarks))})" if any(remarks) else "")
    name = ("--[no-]" if option.base is bool else "--") + option.key
    return _columns(f"{name} {word}".rstrip(), text, width)


def _columns(left: str, right: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(right, width - _INDENT) or [""]
    first = f"  {left:<{_INDENT - 3}} "
    if len(first) > _INDENT:
        return [f"  {left}", *(" " * _INDENT + line for line in wrapped)]
    return [first + wrapped[0], *(" " * _INDENT + line for line in wrapped[1:])]
