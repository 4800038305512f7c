"""Where all threads of a process stand, written without the help of its interpreter."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

DUMP_SIGNAL = signal.SIGUSR2
"""A process that gets this signal writes its stacks, even if it is stuck in C code."""


class StackFile:
    """The file that takes this process's stacks; it stays only if something was written."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._file: TextIO | None = None

    def open(self, path: Path) -> None:
        """Says where stacks go; until then they go to stderr."""
        self.path = path
        self._file = path.open("a")
        faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True)

    def dump(self) -> None:
        """Writes the stacks of all threads, and has the loader's processes write theirs to stderr."""
        if self._file is not None:
            self._file.write(time.strftime("%Y-%m-%dT%H:%M:%S%z\n"))
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)
        else:
            faulthandler.dump_traceback(all_threads=True)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, DUMP_SIGNAL)

    def alarm(self, seconds: float) -> None:
        """Has the stacks written and the process ended in some seconds, unless this is called again before.

        It needs no interpreter, so it also ends a process whose threads all wait for one that is stuck in C code.
        """
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file or sys.stderr)

    def close(self) -> None:
        """Ends the watch for the signal, and the alarm."""
        faulthandler.cancel_dump_traceback_later()
        if self._file is None or self.path is None:
            return
        faulthandler.unregister(DUMP_SIGNAL)
        self._file.close()
        self._file = None
        with contextlib.suppress(OSError):
            if self.path.stat().st_size == 0:
                self.path.unlink()


def wake_and_dump(pids: Sequence[int]) -> None:
    """Has processes of this run that give no sign of life write their stacks, stopped ones too, and ends them."""
    for number, pause in ((DUMP_SIGNAL, 0.0), (signal.SIGCONT, 1.0), (signal.SIGKILL, 0.0)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        time.sleep(pause)
