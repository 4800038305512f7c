"""Shows how far preprocessing is: a bar on a terminal, else a line from time to time."""

from __future__ import annotations

import sys
import time
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


class BuildProgress:
    """Lines, tokens and their rate; share and time left where the size is known."""

    def __init__(self) -> None:
        self._began = self._said = time.perf_counter()
        self._total = self._done = self._before = self.lines = self.tokens = 0
        self._bar: Any = None
        self._task: Any = None

    def start(self, total_bytes: int, done_bytes: int) -> None:
        """Begins with what an earlier, interrupted build has done."""
        self._total, self._done, self._before = total_bytes, done_bytes, done_bytes
        if done_bytes:
            print(f"Continuing: {done_bytes:,} of {total_bytes:,} bytes are done", flush=True)
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.percentage:>3.0f}%"),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._task = self._bar.add_task("", total=total_bytes or None, completed=done_bytes, rate="")
            self._bar.start()

    def advance(self, num_bytes: int, lines: int, tokens: int) -> None:
        """Adds what a worker has done."""
        self._done += num_bytes
        self.lines += lines
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, advance=num_bytes, rate=self._rate())
        elif time.perf_counter() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.perf_counter()
            print(f"{self._share()}{self._done / 1e6:,.0f} MB, {self._rate()}", flush=True)

    def finish(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def _share(self) -> str:
        return f"{self._done / self._total:4.0%}, " if self._total else ""

    def _rate(self) -> str:
        seconds = max(time.perf_counter() - self._began, 1e-9)
        text = f"{self.lines:,} lines, {self.tokens:,} tokens, {self.tokens / seconds:,.0f} tokens/s"
        fresh = self._done - self._before
        if self._total and fresh and self._done < self._total:
            text += f", {(self._total - self._done) * seconds / fresh:,.0f} s left"
        return text
