"""R11: one run per folder; the lock of a process that is gone is taken over."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tencentpretrain.errors import ResourceError
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs
from tencentpretrain.reliability.row import Row, Scale
from tencentpretrain.train.run_folder import RunFolder

_AT_ONCE = 6


@ROWS.register("R11")
def check_locks(scale: Scale, folder: Path) -> Row:
    """A second start while the first lives, after it was killed, and many at once."""
    pairs, crowds, whole = (100, 20, 5) if scale == "full" else (10, 2, 1)
    refused = taken = 0
    for number in range(pairs):
        prefix = str(folder / f"pair-{number}")
        holder = _fork(lambda prefix=prefix: _hold(prefix))  # type: ignore[misc]
        _wait_for(Path(f"{prefix}.run") / "lock")
        said = _enter(prefix)
        refused += all(word in said for word in (f"process {holder}", socket.gethostname(), "started 2"))
        os.kill(holder, signal.SIGKILL)
        runs.wait(holder)
        taken += not _enter(prefix)
    single = sum(_crowd(str(folder / f"crowd-{number}")) == 1 for number in range(crowds))
    commands = sum(_commands(folder, number) for number in range(whole))
    return Row(
        name="R11",
        promised="second run refused at once, naming host, process, start; a dead one's lock is taken over: 100/100",
        reached=(
            f"{refused}/{pairs} refused, {taken}/{pairs} taken over after SIGKILL; of {_AT_ONCE} starts at once "
            f"exactly one got in: {single}/{crowds}; {commands}/{whole} with whole commands"
        ),
        passed=(refused, taken, single, commands) == (pairs, pairs, crowds, whole),
    )


def _fork(work: Callable[[], int]) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        status = work()
    finally:
        os._exit(status)


def _hold(prefix: str) -> int:
    with RunFolder(prefix):
        time.sleep(600)
    return 0


def _enter(prefix: str) -> str:
    """Tries to own the folder; returns the refusal."""
    try:
        with RunFolder(prefix):
            return ""
    except ResourceError as error:
        return str(error)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.001)


def _crowd(prefix: str) -> int:
    """Starts several processes at one moment; returns how many got in. Who is in stays until the others have gone."""
    moment = time.monotonic() + 0.05

    def start() -> int:
        while time.monotonic() < moment:
            pass
        try:
            return _hold(prefix)
        except ResourceError:
            return 5

    processes = {_fork(start) for _ in range(_AT_ONCE)}
    deadline = time.monotonic() + 30
    while len(processes) > 1 and time.monotonic() < deadline:
        processes -= {process for process in processes if os.waitpid(process, os.WNOHANG)[0]}
        time.sleep(0.005)
    for process in processes:
        os.kill(process, signal.SIGKILL)
        runs.wait(process)
    return len(processes)


def _commands(folder: Path, number: int) -> bool:
    """Starts `pretrain` twice on one output, kills the first, and starts again."""
    flags = [*runs.prepare("lm", folder / f"data-{number}", 30, 10, lines=60), "--num_workers", "0"]
    output = folder / f"whole-{number}"
    long = [*flags, "--output_model_path", str(output), "--total_steps", "100000"]
    first = runs.start(runs.command("pretrain"), long, runs.log_of(output))
    runs.wait_for_step(output, 1, first)
    began = time.monotonic()
    status = runs.train(flags, output, "--total_steps", "100000")
    quick = time.monotonic() - began < 30
    said = f"process {first}" in runs.log_of(output).read_text(encoding="utf-8")
    os.kill(first, signal.SIGKILL)
    runs.wait(first)
    again = runs.train(
        flags, output, "--allow_change", "total_steps", "--total_steps", str(runs.reported_step(output) + 20)
    )
    return status == 5 and quick and said and again == 0
