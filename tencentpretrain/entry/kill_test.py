"""Kills training runs at random moments and compares their ends with runs that were left alone."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tencentpretrain.entry.run import run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Prints an account per objective; the exit code is 1 if any run ended otherwise."""
    parser = argparse.ArgumentParser(prog="kill_test", description=__doc__)
    parser.add_argument("--objectives", nargs="+", default=["mlm", "lm", "t5"], help="default: mlm lm t5")
    parser.add_argument("--steps", type=int, default=300, help="length of a run (default 300)")
    parser.add_argument("--save_steps", type=int, default=20, help="steps between checkpoints (default 20)")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs per objective (default 20)")
    parser.add_argument("--kills_per_run", type=int, default=10, help="then a run may end (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    options = parser.parse_args(argv)
    return run_main(lambda: _kill(options))


def _kill(options: argparse.Namespace) -> int:
    from tencentpretrain.errors import ConfigError
    from tencentpretrain.reliability.kills import kill_and_compare
    from tencentpretrain.reliability.runs import OBJECTIVES

    unknown = set(options.objectives) - set(OBJECTIVES)
    if unknown:
        raise ConfigError(f"objectives: {', '.join(sorted(unknown))} is none of {', '.join(OBJECTIVES)}")
    failed = False
    for objective in options.objectives:
        with tempfile.TemporaryDirectory() as folder:
            account = kill_and_compare(
                objective,
                Path(folder) / objective,
                steps=options.steps,
                save_steps=options.save_steps,
                kills=options.kills,
                kills_per_run=options.kills_per_run,
                seed=options.seed,
            )
        print(account, flush=True)
        failed = failed or account.identical < account.runs
    return 1 if failed else 0
