"""Trains four models on every layout of processes and shows how far each course is from that of one process."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tencentpretrain.entry.run import run_main

if TYPE_CHECKING:
    from tencentpretrain.reliability.layouts import Comparison

_TOLERANCE = 1e-5


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per layout and model; the exit code is 1 if any loss is off by more than 1e-5."""
    parser = argparse.ArgumentParser(prog="distributed_table", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["bert", "gpt2", "t5", "llama"], help="default: all four")
    parser.add_argument("--steps", type=int, default=50, help="updates per run (default %(default)s)")
    parser.add_argument("--layouts", nargs="+", help="such as 'ZeRO-2' 'TP 2' (default: all)")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    parser.add_argument("--page", type=Path, help="write the figures into this page, between its marks")
    options = parser.parse_args(argv)
    return run_main(lambda: _compare(options))


def _compare(options: argparse.Namespace) -> int:
    from tencentpretrain.errors import ConfigError
    from tencentpretrain.reliability.layouts import ARRANGEMENTS, MODELS, compare
    from tencentpretrain.reliability.table import put_table

    known = {place.name for place in ARRANGEMENTS}
    for given, all_names in ((options.models, MODELS), (options.layouts or (), known)):
        if unknown := set(given) - set(all_names):
            raise ConfigError(f"{', '.join(sorted(unknown))}: there is only {', '.join(sorted(all_names))}")
    rows = []
    print(f"{'layout':<22}{'processes':>10}  {'model':<7}{'loss':>9}{'norm':>9}  {'equal to DDP':>13}  repeats")
    for row in compare(
        options.models, options.steps, lambda place: not options.layouts or place.name in options.layouts
    ):
        rows.append(row)
        equal = "-" if row.equal_to_ddp is None else f"{row.equal_to_ddp}/{row.steps}"
        print(
            f"{row.arrangement:<22}{row.world_size:>10}  {row.model:<7}{row.loss:>9.1e}{row.norm:>9.1e}"
            f"  {equal:>13}  {'to the bit' if row.repeats else 'NO'}",
            flush=True,
        )
    if options.page:
        put_table(options.page, _markdown(rows))
    if options.output:
        options.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 1 if any(row.loss > _TOLERANCE or not row.repeats for row in rows) else 0


def _markdown(rows: Sequence[Comparison]) -> str:
    """Returns a line per layout and a column per model: the largest relative difference of the loss."""
    models = list(dict.fromkeys(row.model for row in rows))
    by_place: dict[tuple[str, int], dict[str, Comparison]] = {}
    for row in rows:
        by_place.setdefault((row.arrangement, row.world_size), {})[row.model] = row
    lines = [f"| layout | processes | {' | '.join(models)} | steps equal to DDP to the bit |"]
    lines.append("|---" * (3 + len(models)) + "|")
    for (name, size), found in by_place.items():
        cells = [f"{found[model].loss:.1e}" if model in found else "" for model in models]
        steps = sum(row.steps for row in found.values())
        equal = sum(row.equal_to_ddp or 0 for row in found.values())
        lines.append(f"| {name} | {size} | {' | '.join(cells)} | {equal} of {steps} |")
    return "\n".join(lines) + "\n"
