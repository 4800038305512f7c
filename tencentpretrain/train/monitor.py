"""The thread by which a process of a run tells the others how it is, and looks after them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from tencentpretrain.config.ended import tell_launcher
from tencentpretrain.errors import PeerError, TencentPretrainError
from tencentpretrain.train.neighbours import end_of, is_alive, look_at, machine, standing
from tencentpretrain.train.stacks import StackFile, wake_and_dump

logger = logging.getLogger(__name__)

WORDS_TAKE = 3.0
"""Seconds in which a failed process says why, after its connections broke."""
_ENDING_TAKES = 10.0
"""Seconds in which a process ends by itself after another has failed."""
_BEATS_BETWEEN_ALARMS = 4
_FILE_WORK = 10
"""How many times `hang_timeout` writing and reading of files may take."""
_SIGNS_OF_A_LOST_PEER = ("gloo", "nccl", "connection", "broken pipe", "socket", "store", "peer")


@dataclass(kw_only=True)
class Process:
    """How far a process is.

    Fields:
        rank, size: its place among all.
        hang_timeout: seconds without progress of any process after which the run is ended.
        step: the last one that is done.
        moves: grows with everything that is done.
        busy: the work on files that it is at.
    """

    rank: int
    size: int
    hang_timeout: float
    step: int = 0
    moves: int = 0
    busy: str | None = None


class Monitor(threading.Thread):
    """Tells the others how this process is and looks after them. It has a connection of its own to the store."""

    def __init__(self, process: Process, store: Store) -> None:
        super().__init__(name="peers", daemon=True)
        self.failure: str | None = None
        self._process = process
        self._store = store
        self._interval = min(1.0, process.hang_timeout / 10)
        self._over = threading.Event()
        self._hangs = self._heard_failure = False
        self._places: dict[int, Mapping[str, Any]] = {}
        self._beats: dict[int, Mapping[str, Any]] = {}
        self._heard = {rank: time.monotonic() for rank in range(process.size)}
        self._moved = self._answered = time.monotonic()
        self._parent = int(os.environ.get("TENCENTPRETRAIN_PARENT", "0"))
        self.stacks = StackFile()

    def run(self) -> None:
        beats = 0
        threading.Thread(target=self._watch_store, name="peers-store", daemon=True).start()
        while not self._over.wait(self._interval if beats else 0):
            beats += 1
            self._answered = time.monotonic()
            try:
                self._tell(beats)
                self._look()
            except (dist.DistError, RuntimeError):
                if self._hangs:
                    return  # the other thread speaks
                if self._over.is_set():
                    return
                self._fail(self._lost_leader())
            if self.failure is not None:
                self._answered = math.inf
                self._see_the_end(self.failure)
                return

    def _watch_store(self) -> None:
        """Ends the process when the store has stopped answering: a question to it cannot be taken back."""
        limit = self._process.hang_timeout
        while not self._over.wait(self._interval):
            if time.monotonic() - self._answered > limit + 2 * self._interval:
                self._hangs = True
                self._see_the_end(f"the run hangs: {self._holder()} has not answered for {limit:g} seconds")

    def stop(self) -> None:
        """Ends the thread's work."""
        self._over.set()
        self.stacks.close()

    def explain(self, error: BaseException) -> PeerError | None:
        """Tells the others of this process's error, or returns the error that says it is another's."""
        if isinstance(error, PeerError):
            return None
        if not _of_a_peer(error):
            self._record(self._own(error))
            return None
        deadline = time.monotonic() + WORDS_TAKE
        while self.failure is None and time.monotonic() < deadline:
            try:
                self.failure = self._first_failure() or self._death()
            except (dist.DistError, RuntimeError):
                self.failure = self._lost_leader()
            time.sleep(0.05)
        if self.failure is None and isinstance(error, RuntimeError) and "gloo" in str(error).lower():
            self.failure = f"{self._who(self._process.rank)} lost a process: {_line(error)}"
        if self.failure is None:
            self._record(self._own(error))
            return None
        self._record(self.failure)
        return PeerError(self.failure)

    def _tell(self, beats: int) -> None:
        process = self._process
        if beats == 1:
            place = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid()}
            self._store.set(f"place/{process.rank}", json.dumps(place))
        beat = {"beats": beats, "step": process.step, "moves": process.moves, "busy": process.busy, "at": standing()}
        self._store.set(f"beat/{process.rank}", json.dumps(beat))
        if beats % _BEATS_BETWEEN_ALARMS == 1:
            self.stacks.alarm(2 * process.hang_timeout)
        if self._parent and os.getppid() != self._parent:
            self._parent = 0
            logger.warning("the launcher has ended; finishing the step and saving")
            os.kill(os.getpid(), signal.SIGTERM)

    def _look(self) -> None:
        self.failure = self.failure or self._first_failure()
        if self.failure is None and (death := self._death()):
            time.sleep(self._interval)  # what it had to say itself may be on its way
            self._fail(self._first_failure() or death)
        if self.failure is None and (hang := self._hang()):
            self._hangs = True
            self._fail(hang)

    def _first_failure(self) -> str | None:
        if not self._store.check(["failure/1"]):
            return None
        if not self._heard_failure:
            self._heard_failure = True
            self._store.add("heard", 1)
        word = json.loads(self._store.get("failure/1"))
        self._hangs = self._hangs or word["hang"]
        return str(word["message"])

    def _fail(self, message: str) -> None:
        self._record(message)
        self.failure = message

    def _record(self, message: str) -> None:
        """Tells all what went wrong here; the first word counts."""
        with contextlib.suppress(dist.DistError, RuntimeError):
            number = self._store.add("failures", 1)
            self._store.set(f"failure/{number}", json.dumps({"message": message, "hang": self._hangs}))
            self._first_failure()

    def _own(self, error: BaseException) -> str:
        if isinstance(error, SystemExit):
            what = f"left the run by sys.exit({error.code!r})"
        elif isinstance(error, KeyboardInterrupt):
            what = "was interrupted"
        elif isinstance(error, TencentPretrainError):
            what = f"failed: {error}"
        else:
            what = f"failed: {type(error).__name__}: {_line(error)}"
        return f"{self._who(self._process.rank)} {what} (last step {self._process.step})"

    def _who(self, rank: int) -> str:
        place = self._place(rank)
        return f"rank {rank} on {place['host']} (process {place['pid']})" if place else f"rank {rank}"

    def _place(self, rank: int) -> Mapping[str, Any] | None:
        if rank not in self._places:
            if not self._store.check([f"place/{rank}"]):
                return None
            self._places[rank] = json.loads(self._store.get(f"place/{rank}"))
        return self._places[rank]

    def _neighbours(self) -> Iterator[tuple[int, int]]:
        """Yields rank and process number of the other processes on this machine."""
        own = machine()
        for rank in range(self._process.size):
            place = self._place(rank) if rank != self._process.rank else None
            if place is not None and place["machine"] == own:
                yield rank, place["pid"]

    def dead_neighbours(self) -> int:
        """Returns how many of the other processes of this machine have ended."""
        return sum(not is_alive(pid) for _, pid in self._neighbours())

    def _death(self) -> str | None:
        """Returns who of this machine has ended without having left the run."""
        for rank, pid in self._neighbours():
            alive, code = look_at(pid)
            if not alive and not self._store.check([f"left/{rank}"]):
                end = end_of(rank, code)
                return f"{self._who(rank)} ended without a word{end} (last step {self._last_step(rank)})"
        return None

    def _last_step(self, rank: int) -> int:
        with contextlib.suppress(dist.DistError, RuntimeError):
            if self._store.check([f"beat/{rank}"]):
                self._beats[rank] = json.loads(self._store.get(f"beat/{rank}"))
        return max(int(self._beats[rank]["step"]) if rank in self._beats else 0, self._process.step)

    def _lost_leader(self) -> str:
        with contextlib.suppress(dist.DistError, RuntimeError):
            if death := self._death():
                return death
        place = self._places.get(0)
        alive, code = True, None
        deadline = time.monotonic() + 1  # it may still be writing its core file
        while alive and place and place["machine"] == machine() and time.monotonic() < deadline:
            alive, code = look_at(place["pid"])
            time.sleep(0.02)
        end = "" if alive else end_of(0, code)
        return f"{self._holder()} does not answer any more{end} (last step {self._process.step})"

    def _holder(self) -> str:
        place = self._places.get(0)
        who = f"rank 0 on {place['host']} (process {place['pid']})" if place else "rank 0"
        return f"{who}, which holds the run together,"

    def _hang(self) -> str | None:
        """Returns what to say if no process gets on. The leader watches all, the others the leader."""
        now = time.monotonic()
        for rank in range(self._process.size) if self._process.rank == 0 else (0, self._process.rank):
            if not self._store.check([f"beat/{rank}"]):
                continue
            beat = json.loads(self._store.get(f"beat/{rank}"))
            last = self._beats.get(rank, {})
            if beat["beats"] != last.get("beats"):
                self._heard[rank] = now
            if beat["moves"] != last.get("moves"):
                self._moved = now
            self._beats[rank] = beat
        limit = self._process.hang_timeout
        works = any(
            beat["busy"] and now - self._heard[rank] < limit / 2 + 2 for rank, beat in self._beats.items()
        )  # sign of life from one that reads or writes files
        leader_is_silent = now - self._heard[0] > limit
        if not leader_is_silent and (now - self._moved < (_FILE_WORK * limit if works else limit)):
            return None
        if self._process.rank != 0 and not leader_is_silent and now - self._moved < limit + 3 * self._interval:
            return None  # the leader sees more and speaks first
        places = []
        for rank, beat in self._beats.items():
            silence = now - self._heard[rank]
            silent = f" (no sign of life for {silence:.0f} seconds)" if silence > 3 * self._interval + 1 else ""
            places.append(f"\n  rank {rank}: after step {beat['step']} in {beat['at']}{silent}")
        return f"the run hangs: no process got on for {limit:g} seconds{''.join(places)}"

    def _see_the_end(self, failure: str) -> None:
        """Lets the main thread end by itself; ends the process if it does not, at once if it hangs."""
        if self._hangs:
            self.stacks.alarm(10 + 6 * self._interval)
            self._dump_stacks()
        else:
            self._over.wait(_ENDING_TAKES)
            if self._over.is_set():
                return
        logger.error("%s", failure)
        tell_launcher(failure)
        sys.stderr.flush()
        os._exit(PeerError.exit_code)

    def _dump_stacks(self) -> None:
        self.stacks.dump()
        now, own = time.monotonic(), machine()
        silent = [
            place["pid"]
            for rank, place in self._places.items()
            if place["machine"] == own
            and rank != self._process.rank
            and now - self._heard[rank] > self._process.hang_timeout / 2
        ]
        time.sleep(2 * self._interval)  # the others hear of it
        wake_and_dump([pid for pid in silent if is_alive(pid)])


def _of_a_peer(error: BaseException) -> bool:
    """Whether an error may be the effect of another process's end."""
    if isinstance(error, TencentPretrainError) or not isinstance(error, (RuntimeError, OSError)):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in _SIGNS_OF_A_LOST_PEER)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
