"""Injects faults and prints the figure reached beside the figure promised, a line per row."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from tencentpretrain.entry.run import run_main
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import ROWS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs rows; the exit code is 1 if a promise was not held."""
    parser = argparse.ArgumentParser(prog="reliability", description=__doc__)
    parser.add_argument(
        "--scale", choices=["ci", "full"], default="ci", help="seconds, or the full counts (default ci)"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"default: all ({' '.join(ROWS.names())})")
    parser.add_argument("--record", type=Path, metavar="FILE", help="put the figures in this JSON file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table of --record into this page")
    options = parser.parse_args(argv)
    return run_main(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models, several processes at a time
    chosen = [ROWS.canonical(name) for name in options.rows or ()]
    from tencentpretrain.reliability import table

    if options.record:
        table.recorded(options.record)
    if options.page and not options.record:
        raise ConfigError("page: needs --record, whose figures it shows")
    if options.page:
        table.put_table(options.page, table.markdown(table.recorded(options.record)))
    held = 0
    chosen = chosen or list(table.names())
    for row, seconds in table.run_rows(chosen, options.scale):
        held += row.passed
        mark = "held" if row.passed else "LOST"
        print(
            f"{row.name:4} {mark} {seconds:7.1f} s\n  promised: {row.promised}\n  reached:  {row.reached}", flush=True
        )
        if options.record:
            table.record(options.record, row, options.scale, seconds)
    if options.page and options.record:
        table.put_table(options.page, table.markdown(table.recorded(options.record)))
    print(f"{held} of {len(chosen)} rows held")
    return 0 if held == len(chosen) else 1
