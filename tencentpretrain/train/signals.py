"""Ctrl-C, termination and a time limit: the first asks to finish the step and save, the second Ctrl-C leaves now."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

from tencentpretrain.config.launcher import read_place

_NAMES = (signal.SIGINT, signal.SIGTERM)
_LAUNCHER_REPEATS = 2.0
"""Seconds in which a launcher passes on a Ctrl-C that its processes have had from the terminal already."""


class StopRequest:
    """Within its `with` block, SIGINT and SIGTERM only set `number`; a second SIGINT raises KeyboardInterrupt.

    Args:
        time_limit: minutes from now after which an end is asked for too.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.number: int | None = None
        self._time_limit = time_limit
        self._deadline = None if time_limit is None else time.monotonic() + 60 * time_limit
        self._before: dict[int, object] = {}
        self._received = 0.0
        self._repeats = _LAUNCHER_REPEATS if read_place() else 0.0

    def __enter__(self) -> StopRequest:
        for name in _NAMES:
            try:
                self._before[name] = signal.signal(name, self._receive)
            except ValueError:  # not in the main thread: its owner handles signals
                break
        return self

    def __exit__(self, *error: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.number == signal.SIGINT and now - self._received >= self._repeats:
            raise KeyboardInterrupt
        if self.number is None:
            self._received = now
        self.number = number

    @property
    def asked(self) -> bool:
        """Whether an end has been asked for, by a signal or by the clock."""
        return self.number is not None or (self._deadline is not None and time.monotonic() >= self._deadline)

    def agreed(self, any_rank: Callable[[bool], bool]) -> bool:
        """Returns whether an end was asked for on any process, and makes its reason that of all. Collective.

        Args:
            any_rank: returns whether a flag is set on any process.
        """
        if not any_rank(self.asked):
            return False
        for number in (signal.SIGTERM, signal.SIGINT):
            if any_rank(self.number == number):
                if self.number is None:
                    self._received = time.monotonic()
                self.number = number
                return True
        self._deadline = 0.0
        return True

    @property
    def name(self) -> str:
        """The signal's name or the time limit, for messages."""
        if self.number is not None:
            return signal.Signals(self.number).name
        return f"the time limit of {self._time_limit:g} minutes" if self.asked else ""

    @property
    def exit_code(self) -> int:
        """0, or 128 plus the signal's number; a time limit is a good end."""
        return 0 if self.number is None else 128 + self.number
