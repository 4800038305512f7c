"""Runs of several processes to do harm to: forks of this one that find a launcher's variables in their environment."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tencentpretrain.data.durable import write_durably
from tencentpretrain.reliability import runs

Fault = Callable[[], None]
"""Changes a process before its run begins."""


def free_port() -> int:
    """Returns a port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


@dataclass(kw_only=True)
class Ranks:
    """The processes of one run.

    Fields:
        pids: by rank; each leads a session, so that what it starts can be found.
        logs: what each has said, by rank.
        exits: where their ends are told to the others, as a launcher does.
        codes: exit codes, or minus the signal, of those that have ended.
        seconds: when they ended.
    """

    pids: dict[int, int]
    logs: dict[int, Path]
    exits: Path
    codes: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    def wait(self, most: float = 120.0) -> dict[int, int]:
        """Waits for the ends of all; what runs longer than `most` seconds is killed and counts as -9."""
        deadline = time.monotonic() + most
        while len(self.codes) < len(self.pids):
            for rank, pid in self.pids.items():
                if rank in self.codes:
                    continue
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
                    self.seconds[rank] = time.monotonic()
                    write_durably(self.exits / f"exit-{rank}", str(self.codes[rank]).encode())
            time.sleep(0.01)
        return dict(sorted(self.codes.items()))

    def text(self, rank: int) -> str:
        """Returns what a process has said."""
        return self.logs[rank].read_text(errors="replace") if self.logs[rank].exists() else ""

    def end_of(self, rank: int, lines: int = 20) -> str:
        """Returns the last lines that a process has said."""
        return "\n".join(self.text(rank).splitlines()[-lines:])

    def left_behind(self, patience: float = 5.0) -> list[int]:
        """Returns the processes of the run that are still there some seconds after its end, and ends them."""
        deadline = time.monotonic() + patience
        while (rest := members(set(self.pids.values()))) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in rest:
            os.kill(pid, signal.SIGKILL)
        return rest


def start_ranks(
    flags: Sequence[str],
    output: Path,
    size: int = 2,
    *,
    more: Mapping[int, Sequence[str]] | None = None,
    faults: Mapping[int, Fault] | None = None,
    environ: Mapping[int, Mapping[str, str]] | None = None,
    ranks: Sequence[int] | None = None,
    port: int | None = None,
) -> Ranks:
    """Starts `pretrain` in a process per rank.

    Args:
        flags: of all.
        more, faults, environ: by rank: further flags, what is done to the process first, and its variables.
        ranks: those that are started; default: all of `size`.
        port: where they meet.
    """
    runs.warm_up()
    started = Ranks(pids={}, logs={}, exits=Path(f"{output}-exits"))
    started.exits.mkdir(parents=True, exist_ok=True)
    meeting = str(free_port() if port is None else port)
    for rank in range(size) if ranks is None else ranks:
        variables = {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "localhost", "MASTER_PORT": meeting,
            "TENCENTPRETRAIN_EXITS": str(started.exits), **(environ or {}).get(rank, {}),
        }  # fmt: skip
        command = _prepared(variables, (faults or {}).get(rank))
        started.logs[rank] = Path(f"{output}-rank-{rank}.txt")
        arguments = [*flags, "--output_model_path", str(output), *(more or {}).get(rank, ())]
        started.pids[rank] = runs.start(command, arguments, started.logs[rank])
    return started


def _prepared(variables: Mapping[str, str], fault: Fault | None) -> runs.Command:
    def command(arguments: Sequence[str]) -> int:
        os.setsid()
        os.environ.update(variables)
        if fault is not None:
            fault()
        return runs.command("pretrain")(arguments)

    return command


def members(sessions: set[int]) -> list[int]:
    """Returns the living processes of some sessions."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) in sessions and state not in "ZX":
            found.append(int(entry.name))
    return found


def children(pid: int) -> list[int]:
    """Returns the living processes that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if parent == str(pid) and state not in "ZX":
            found.append(int(entry.name))
    return found


def at_step(step: int, happens: Callable[[], None]) -> Fault:
    """Returns a fault that happens in the main thread, in the midst of a step."""

    def fault() -> None:
        from tencentpretrain.train.trainer import Trainer

        train_step = Trainer.train_step

        def harmed(trainer: Trainer, *arguments: object, **keywords: object) -> object:
            if trainer.step == step:
                happens()
            return train_step(trainer, *arguments, **keywords)  # type: ignore[arg-type]

        Trainer.train_step = harmed  # type: ignore[method-assign, assignment]

    return fault
