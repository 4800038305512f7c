"""Starts the processes of a run on this machine, without a launcher: the old flags --world_size and --gpu_ranks.

Nothing heavy is imported: this process only starts the others, passes signals on and tells how they ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tencentpretrain.config.ended import how_ended
from tencentpretrain.config.launcher import parse_address
from tencentpretrain.config.train import LaunchConfig
from tencentpretrain.errors import PeerError

_STOPPED = (130, 143)
_TOLD = (2, 3, 4, 5, 6, *_STOPPED)
"""Exit codes by which a process says itself what happened; any other end is one of a peer."""
_ENDING_TAKES = 30.0
"""Seconds in which the others end by themselves after one has failed."""


def spawn_ranks(launch: LaunchConfig, command: Sequence[str]) -> int:
    """Starts a process per listed rank, waits for all and returns the exit code of the run.

    That is the code of the first process that failed if it says what happened, else 7. The failed process's own error
    is repeated at the end.

    Args:
        launch: ranks of this machine and where all meet.
        command: what each process runs, after the interpreter.
    """
    with tempfile.TemporaryDirectory() as place, _passed_on() as processes:
        folder = Path(place)
        for local_rank, rank in enumerate(launch.gpu_ranks):
            environ = _environment(launch, rank, local_rank, folder)
            processes[rank] = subprocess.Popen([sys.executable, *command], env=environ)
        first = _wait(processes, folder)
        if first is None:
            return 0
        code = processes[first].returncode
        if code not in _STOPPED:
            print(f"error: {_account(first, processes, folder)}", file=sys.stderr, flush=True)
        return code if code in _TOLD else PeerError.exit_code


def _environment(launch: LaunchConfig, rank: int, local_rank: int, folder: Path) -> dict[str, str]:
    address, port = parse_address(launch.master_ip)
    package = str(Path(__file__).resolve().parents[2])
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(len(launch.gpu_ranks)),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_ERROR_FILE": str(folder / f"error-{rank}.json"),
        "TENCENTPRETRAIN_LAUNCHER": "--world_size",
        "TENCENTPRETRAIN_PARENT": str(os.getpid()),
        "TENCENTPRETRAIN_EXITS": str(folder),
        "PYTHONPATH": os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH")) if part),
    }


@contextmanager
def _passed_on() -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """Yields the place for the processes; signals go on to them, and none outlives the block."""
    processes: dict[int, subprocess.Popen[bytes]] = {}

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes.values():
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield processes
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Mapping[int, subprocess.Popen[bytes]], folder: Path) -> int | None:
    """Waits for all processes and returns the rank that failed first; None if all did their work."""
    first: int | None = None
    ended: set[int] = set()
    deadline = float("inf")
    while len(ended) < len(processes):
        for rank, process in processes.items():
            code = None if rank in ended else process.poll()
            if code is None:
                continue
            ended.add(rank)
            with contextlib.suppress(OSError):
                part = folder / f".exit-{rank}"
                part.write_text(str(code))
                part.rename(folder / f"exit-{rank}")
            if code != 0 and (first is None or _is_effect(processes[first].returncode, code)):
                first = rank
                deadline = min(deadline, time.monotonic() + _ENDING_TAKES)
        if time.monotonic() > deadline:
            for process in processes.values():
                process.kill()
        time.sleep(0.05)
    return first


def _is_effect(earlier: int, code: int) -> bool:
    """Whether an end that was seen earlier is only the effect of one that was seen now."""
    return earlier == PeerError.exit_code and code != PeerError.exit_code and code != -signal.SIGKILL


def _account(rank: int, processes: Mapping[int, subprocess.Popen[bytes]], folder: Path) -> str:
    process = processes[rank]
    who = f"rank {rank} on {socket.gethostname()} (process {process.pid})"
    try:
        message = str(json.loads((folder / f"error-{rank}.json").read_text())["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        message = ""
    if process.returncode == 0:
        return f"{who} left early"
    end = f"{'' if process.returncode < 0 else 'ended '}{how_ended(process.returncode)}"
    return f"{who} {end}: {message}" if message else f"{who} {end}"
