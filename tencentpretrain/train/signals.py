"""Ctrl-C and termination: the first asks to finish the step and save, the second Ctrl-C leaves now."""

from __future__ import annotations

import signal
from types import FrameType

_NAMES = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Within its `with` block, SIGINT and SIGTERM only set `number`; a second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, object] = {}

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
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    @property
    def name(self) -> str:
        """The signal's name, for messages."""
        return "" if self.number is None else signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """0, or 128 plus the signal's number."""
        return 0 if self.number is None else 128 + self.number
