"""What `pretrain.py` and `tencentpretrain pretrain` run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tencentpretrain.config.launcher import read_place
from tencentpretrain.config.run import load_run
from tencentpretrain.engines.spawning import spawn_ranks
from tencentpretrain.entry.run import run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the flags and pre-trains; returns the exit code."""
    return run_main(lambda: _pretrain(list(sys.argv[1:] if argv is None else argv)))


def _pretrain(argv: list[str]) -> int:
    run = load_run(argv)
    if run.launch.world_size > 1 and read_place() is None:
        return spawn_ranks(run.launch, ["-m", "tencentpretrain", "pretrain", *argv])
    if read_place() is not None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer is told in a sentence, not in stack frames

    from tencentpretrain.train.pretraining import pretrain

    return pretrain(run, ["pretrain.py", *argv])
