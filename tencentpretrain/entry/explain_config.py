"""`tencentpretrain explain-config`: each setting of a run, its value, where it comes from and which section owns it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from tencentpretrain.config.cli import Parsed, read_sections
from tencentpretrain.config.compatibility import pretrain_notices, pretrain_problems
from tencentpretrain.config.export import keys_of, to_published
from tencentpretrain.config.options import show
from tencentpretrain.config.run import PRETRAIN_PARTS
from tencentpretrain.entry.run import run_main
from tencentpretrain.errors import ConfigError

_USAGE = """usage: explain_config.py [--given] [--json] [flags of pretrain.py]

Shows what pretrain.py would run with: key, value, source (default, file:line or flag), owner.
  --given   only what a file or a flag sets
  --json    for a script
Problems follow on stderr; the exit code is then 2.

example: explain_config.py --config_path models/bert/mini_config.json --learning_rate 1e-4 --given
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the settings; returns the exit code."""
    return run_main(lambda: _explain(list(sys.argv[1:] if argv is None else argv)))


def _explain(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(_USAGE, end="")
        return 0
    own = {"--given", "--json"} & {*argv}
    parsed, problems = read_sections(
        PRETRAIN_PARTS,
        [token for token in argv if token not in own],
        checks=(pretrain_problems,),
        notices=(pretrain_notices,),
    )
    rows = _rows(parsed, given="--given" in own)
    if "--json" in own:
        print(json.dumps({row["key"]: row for row in rows}, indent=2, ensure_ascii=False))
    else:
        _print_table(rows)
    for notice in parsed.notices:
        print(f"notice: {notice}", file=sys.stderr)
    if problems:
        raise ConfigError(problems, source=parsed.config_path)
    return 0


def _rows(parsed: Parsed, *, given: bool) -> list[dict[str, Any]]:
    values = to_published(parsed, run_paths=True)
    rows = []
    for key, part in keys_of(parsed.parts).items():
        origin = parsed.origin[key]
        if part.name == "file" or (origin.source == "default" and given):
            continue
        source = origin.place or origin.source
        rows.append({"key": key, "value": values.get(key), "source": source, "owner": part.section.__name__})
    return sorted(rows, key=lambda row: (row["owner"], row["key"]))


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = [("key", "value", "source", "section")]
    table += [(row["key"], show(row["value"]), row["source"], row["owner"]) for row in rows]
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    for line in table:
        cells = [f"{cell:<{width}}" for cell, width in zip(line[:3], widths, strict=True)]
        print("  ".join([*cells, line[3]]))
