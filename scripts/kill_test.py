"""Shows that killed runs end as if they had been left alone. Try: python scripts/kill_test.py --kills 20"""

import argparse
import sys
import tempfile
from pathlib import Path

from tencentpretrain.entry.run import run_main


def main() -> int:
    """Prints an account per objective; the exit code is 1 if any run ended otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objectives", nargs="+", default=["mlm", "lm", "t5"])
    parser.add_argument("--steps", type=int, default=300, help="length of a run (default 300)")
    parser.add_argument("--save_steps", type=int, default=20, help="steps between checkpoints (default 20)")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs per objective (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    options = parser.parse_args()

    import tencentpretrain.train.pretraining  # noqa: F401  # imported before the forks, so that they start at once
    from tencentpretrain.parity.interruptions import kill_and_compare

    failed = False
    for objective in options.objectives:
        with tempfile.TemporaryDirectory() as folder:
            account = kill_and_compare(
                objective,
                Path(folder) / objective,
                steps=options.steps,
                save_steps=options.save_steps,
                kills=options.kills,
                seed=options.seed,
            )
        print(account, flush=True)
        failed = failed or account.identical < account.runs
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
