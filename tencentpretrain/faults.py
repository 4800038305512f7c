"""Faults on demand at every place where the package writes, for its tests.

    TENCENTPRETRAIN_FAULT="<point>[/<file>]:<occurrence>:<action>[:<rank>]"

The action happens when the point is reached for that time (1 is the first), where given only for files of that name
and only in the process of that RANK. Actions: `kill` (SIGKILL), `raise` (an unexpected error), `delay` (a second),
`ENOSPC` and `EIO` (what a full or failing disk raises, after half of the bytes), `short` (half of the bytes, then
SIGKILL), `flip` (one bit of the bytes, in silence). Without the variable a point costs one comparison.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from tencentpretrain.errors import ConfigError

VARIABLE = "TENCENTPRETRAIN_FAULT"

Action = Literal["kill", "raise", "delay", "ENOSPC", "EIO", "short", "flip"]
ACTIONS: tuple[str, ...] = get_args(Action)


@dataclass(frozen=True)
class Point:
    """A place where something reaches the disk.

    Fields:
        file: where it is in the package.
        what: what is about to happen there.
        content: whether bytes are written, so that `short` and `flip` mean something.
    """

    file: str
    what: str
    content: bool = False


POINTS: Mapping[str, Point] = {
    "folder.sync": Point("data/durable.py", "the names in a folder are synchronised"),
    "file.open": Point("data/durable.py", "a new file is opened under a passing name"),
    "file.write": Point("data/durable.py", "a block is written", content=True),
    "file.sync": Point("data/durable.py", "a file's bytes are synchronised"),
    "file.rename": Point("data/durable.py", "a whole file takes its name"),
    "file.discard": Point("data/durable.py", "a file that failed is removed"),
    "directory.make": Point("checkpoint/atomic.py", "a directory is made for unfinished files"),
    "directory.sync-file": Point("checkpoint/atomic.py", "a file of a directory is synchronised"),
    "directory.rename": Point("checkpoint/atomic.py", "a whole directory takes its name"),
    "directory.retire": Point("checkpoint/atomic.py", "a directory loses its name before it is deleted"),
    "directory.unlink": Point("checkpoint/atomic.py", "a file of a nameless directory is deleted"),
    "directory.remove": Point("checkpoint/atomic.py", "an emptied directory is deleted"),
    "aside.rename": Point("checkpoint/atomic.py", "something is moved aside"),
    "part.discard": Point("checkpoint/parts.py", "a file of a part that failed is removed"),
    "part.unlink": Point("checkpoint/parts.py", "the note of a process's part is removed"),
    "metrics.open": Point("train/metrics.py", "metrics.jsonl is opened to append"),
    "metrics.write": Point("train/metrics.py", "a record is appended", content=True),
    "metrics.sync": Point("train/metrics.py", "metrics.jsonl is synchronised"),
    "log.write": Point("train/run_folder.py", "a line of the log is written"),
    "lock.open": Point("train/run_folder.py", "the lock of a run is opened"),
    "lock.write": Point("train/run_folder.py", "the earlier holder of a run is forgotten"),
    "lock.note": Point("train/run_folder.py", "the holder of a run is noted"),
    "lock.clear": Point("train/run_folder.py", "the holder of a run is forgotten"),
    "earlier.make": Point("train/run_folder.py", "a folder for an earlier run is made"),
    "earlier.rename": Point("train/run_folder.py", "a file of an earlier run is set aside"),
    "plot.write": Point("train/plot.py", "the loss curve is drawn"),
    "plot.rename": Point("train/plot.py", "the loss curve takes its name"),
    "shard.unlink": Point("data/shards.py", "an unfinished shard's ledger is removed"),
    "shard.open": Point("data/shards.py", "a file of a shard is opened"),
    "shard.write": Point("data/shards.py", "records are written", content=True),
    "shard.sync": Point("data/shards.py", "a file of a shard is synchronised"),
    "shard.rename": Point("data/shards.py", "a whole file of a shard takes its name"),
    "shard.discard": Point("data/shards.py", "a file of a shard that failed is removed"),
    "shard.discard-old": Point("data/build.py", "a file that a worker left unfinished is removed"),
    "store.clear": Point("data/build.py", "parts of other inputs are removed"),
    "store.make": Point("data/build.py", "the folder of parts is made"),
    "spool.open": Point("data/build.py", "a range of a compressed corpus is unpacked to a file"),
    "spool.write": Point("data/build.py", "a piece of an unpacked range is written", content=True),
    "spool.unlink": Point("data/build.py", "an unpacked range is removed"),
    "rejected.open": Point("data/publish.py", "the list of rejected lines is opened"),
    "rejected.write": Point("data/publish.py", "a rejected line is listed", content=True),
    "rejected.sync": Point("data/publish.py", "the list of rejected lines is synchronised"),
    "index.open": Point("data/publish.py", "an index file is opened"),
    "index.write": Point("data/publish.py", "a piece of an index is written", content=True),
    "index.sync": Point("data/publish.py", "an index file is synchronised"),
    "store.unlink": Point("data/publish.py", "a part that the store does not need is removed"),
    "store.replace": Point("data/publish.py", "a store that is overwritten loses its name"),
    "store.rename": Point("data/publish.py", "the folder of parts becomes the store"),
    "store.remove": Point("data/publish.py", "an overwritten store is removed"),
    "store.remove-file": Point("data/publish.py", "an overwritten data set of one file is removed"),
}
"""Every point by name. `tests/integration/test_faults.py` refuses a write without one."""


class InjectedFault(Exception):
    """What the action `raise` raises: an error that no code expects."""


class Writable(Protocol):
    """What takes bytes."""

    def write(self, content: Any, /) -> Any: ...


@dataclass
class _Plan:
    point: str
    file: str | None
    occurrence: int
    action: str
    trace: Path | None = None
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def due(self, name: str, path: Path | str | None) -> bool:
        file = Path(path).name if path is not None else ""
        with self.lock:
            if self.trace is not None:
                descriptor = os.open(self.trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                os.write(descriptor, f"{name}\t{file}\n".encode())
                os.close(descriptor)
            if name != self.point or self.file not in (None, file):
                return False
            self.counts[name] += 1
            return self.counts[name] == self.occurrence


_plan: _Plan | None = None


def reach(name: str, path: Path | str | None = None) -> None:
    """Marks a point; `path` is what is about to change."""
    if _plan is not None and _plan.due(name, path):
        _act(_plan.action, path)


def write(name: str, file: Writable, content: Any, path: Path | str | None = None) -> None:
    """Writes to a file, at a point."""
    if _plan is None or not _plan.due(name, path):
        file.write(content)
        return
    action, whole = _plan.action, bytes(memoryview(content).cast("B"))
    if action == "flip" and whole:
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        file.write(bytes(flipped))
        return
    if action in ("short", "ENOSPC", "EIO"):
        file.write(whole[: len(whole) // 2])
    _act("kill" if action == "short" else action, path)
    file.write(content)


def arm(switch: str | None) -> None:
    """Sets the switch of this process, in the form of the variable; None turns it off.

    Raises:
        ConfigError: there is no such point or action.
    """
    global _plan
    _plan = _parse(switch) if switch else None


def trace(path: Path | None) -> None:
    """Lists every point that this process reaches in a file: its name, a tab, the name of what it changes."""
    global _plan
    _plan = None if path is None else _Plan("", None, 0, "", trace=path)


def _parse(switch: str) -> _Plan | None:
    fields = switch.split(":")
    try:
        where, occurrence, action = fields[0], int(fields[1]), fields[2]
        rank = fields[3] if len(fields) > 3 else None
    except (IndexError, ValueError):
        raise ConfigError(f"{VARIABLE}={switch}: must be <point>[/<file>]:<occurrence>:<action>[:<rank>]") from None
    name, _, file = where.partition("/")
    if name not in POINTS:
        raise ConfigError(f"{VARIABLE}={switch}: there is no point {name!r}; points: {', '.join(POINTS)}")
    if action not in ACTIONS:
        raise ConfigError(f"{VARIABLE}={switch}: there is no action {action!r}; actions: {', '.join(ACTIONS)}")
    if rank is not None and rank != os.environ.get("RANK", "0"):
        return None
    return _Plan(name, file or None, occurrence, action)


def _act(action: str, path: Path | str | None) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise InjectedFault(f"injected at {path}")
    elif action == "delay":
        time.sleep(1.0)
    elif action in ("ENOSPC", "EIO"):
        code = getattr(errno, action)
        raise OSError(code, os.strerror(code), str(path))


arm(os.environ.get(VARIABLE))
