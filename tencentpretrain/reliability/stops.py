"""R3: a run that is asked to end finishes its step, saves, says so by its exit code, and continues exactly."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tencentpretrain.checkpoint.training import CheckpointFolder
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs
from tencentpretrain.reliability.row import Row, Scale

_STEPS = 60
_KINDS = (signal.SIGTERM, signal.SIGINT, None)
_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, None: 0}
_MOST_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class _Stop:
    """One request to end. `seconds` is from the signal to the end of the process; `struck` is False if it came late."""

    struck: bool
    seconds: float
    problems: tuple[str, ...]


@ROWS.register("R3")
def check_stops(scale: Scale, folder: Path) -> Row:
    """SIGTERM, SIGINT and time limits at random steps."""
    wanted = 200 if scale == "full" else 3
    draw = random.Random(3)
    flags = [*runs.prepare("mlm", folder, _STEPS, 1000), "--num_workers", "0", "--report_steps", "1"]
    began = time.monotonic()
    process = runs.start(
        runs.command("pretrain"), [*flags, "--output_model_path", str(folder / "alone")], folder / "alone.txt"
    )
    runs.wait_for_step(folder / "alone", 1, process)
    ready = time.monotonic() - began
    runs.wait(process)
    length = time.monotonic() - began
    struck = held = number = 0
    slowest = 0.0
    problems: list[str] = []
    while struck < wanted and number < 3 * wanted:
        number += 1
        kind = _KINDS[struck % len(_KINDS)]
        limit = draw.uniform(ready * 0.8, length * 0.95)
        stop = _stop(flags, folder, number, kind, draw.randrange(1, _STEPS - 5), limit)
        if not stop.struck:
            continue
        struck += 1
        held += not stop.problems
        slowest = max(slowest, stop.seconds)
        problems += [f"stop {number} by {kind.name if kind else 'time limit'}: {text}" for text in stop.problems]
    return Row(
        name="R3",
        promised=(
            "SIGTERM, SIGINT, time limit at random steps: step finished, checkpoint published, exit 143, 130, 0, "
            "resume identical: 200/200; exit within 30 s"
        ),
        reached=f"{held}/{struck}; exit within {slowest:.1f} s" + "".join(f"; {text}" for text in problems[:3]),
        passed=held == struck == wanted and slowest <= _MOST_SECONDS,
    )


def _stop(flags: list[str], folder: Path, number: int, kind: signal.Signals | None, step: int, limit: float) -> _Stop:
    """Stops a run and lets it continue.

    Args:
        kind: the signal, or None for a time limit.
        step: the signal comes after it.
        limit: seconds of the time limit.
    """
    output = folder / f"stopped-{number}"
    more = [] if kind else ["--time_limit", f"{limit / 60:.6f}"]
    process = runs.start(
        runs.command("pretrain"), [*flags, *more, "--output_model_path", str(output)], runs.log_of(output)
    )
    asked = time.monotonic()
    if kind:
        runs.wait_for_step(output, step, process)
        asked = time.monotonic()
        os.kill(process, kind)
    status = runs.wait(process)
    seconds = time.monotonic() - asked if kind else max(0.0, time.monotonic() - asked - limit)
    reached = runs.reported_step(output)
    if reached == _STEPS:
        return _Stop(struck=False, seconds=0.0, problems=())
    problems = []
    if status != _CODES[kind]:
        problems.append(f"exit code {status}")
    saved = CheckpointFolder(runs.checkpoints_of(output)).steps()
    if saved[-1:] != [reached]:
        problems.append(f"step {reached} was reported, saved are {saved}")
    if status := runs.train(flags, output):
        problems.append(f"exit code {status} when continued")
    problems += runs.differences(folder / "alone", output, _STEPS)
    return _Stop(struck=True, seconds=seconds, problems=tuple(problems))
