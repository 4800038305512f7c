"""What can be seen of other processes on this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from pathlib import Path

from tencentpretrain.config.ended import how_ended


def standing() -> str:
    """Returns where the main thread is: the innermost line of this package."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = frame.f_code.co_filename
        if "tencentpretrain" in path:
            return f"{'/'.join(Path(path).parts[-2:])}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "no line of this package"


def machine() -> str:
    """Returns what processes have in common that see each other's numbers."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def is_alive(pid: int) -> bool:
    """Returns whether a process of this machine runs or is stopped; a dead one its parent has not seen is not."""
    return look_at(pid)[0]


def look_at(pid: int) -> tuple[bool, int | None]:
    """Returns whether a process of this machine is alive, and its exit code, or minus its signal, if seen."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False, None
    except OSError:
        return True, None
    if values[0] not in "ZXx":
        return True, None
    status = int(values[-1])
    return False, -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def end_of(rank: int, code: int | None) -> str:
    """Says how a process ended that gave no word.

    Args:
        code: as `look_at` returned it; None asks the launcher for a second.
    """
    folder = os.environ.get("TENCENTPRETRAIN_EXITS")
    deadline = time.monotonic() + 1
    while code is None and folder and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            code = int((Path(folder) / f"exit-{rank}").read_text())
        time.sleep(0.05)
    return ": killed, out of memory, or crashed" if code is None else f", {how_ended(code)}"
