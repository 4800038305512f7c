"""What the processes of a run know of each other besides sums: who leads, who failed, who hangs, who disagrees.

It goes through the store at which the processes met, never through sums on the device, so it works while they do not. A
thread of each process tells every second how far the process is and looks after the others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from tencentpretrain.config.ended import how_ended, tell_launcher
from tencentpretrain.errors import PeerError, TencentPretrainError
from tencentpretrain.train.stacks import StackFile, wake_and_dump

logger = logging.getLogger(__name__)

_WORDS_TAKE = 3.0
"""Seconds in which a failed process says why, after its connections broke."""
_ENDING_TAKES = 10.0
"""Seconds in which a process ends by itself after another has failed."""
_FILE_WORK = 10
"""How many times `hang_timeout` writing and reading of files may take."""
_SIGNS_OF_A_LOST_PEER = ("gloo", "nccl", "connection", "broken pipe", "socket", "store", "peer")


class Peers:
    """The processes of a run, as this one sees them. For one process alone nothing happens here.

    Within its `with` block an error of this process is told to the others, and an error that comes from the others is
    raised as PeerError which says who failed and why.

    Args:
        hang_timeout: seconds without progress of any process after which the run is ended.

    Attributes:
        leads: whether this is the process that writes the run's files.
    """

    def __init__(self, rank: int = 0, size: int = 1, hang_timeout: float = 1800) -> None:
        self.rank, self.size = rank, size
        self.leads = rank == 0
        self.hang_timeout = hang_timeout
        self.step = 0
        self._moves = 0
        self._busy: str | None = None
        self._monitor: _Monitor | None = None
        self._store: Store | None = None

    def __enter__(self) -> Peers:
        if self.size > 1:
            self._store = PrefixStore("peers", dist.distributed_c10d._get_default_store())
            self._monitor = _Monitor(self, self._store.clone())
            self._monitor.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._monitor is None:
            return
        if error is None:
            self._leave()
            return
        replacement = self._monitor.explain(error)
        self._let_go()
        self._monitor.stop()
        if replacement is not None:
            raise replacement from (None if isinstance(error, RuntimeError) else error)

    def progress(self, step: int | None = None) -> None:
        """Says that this process got on; `step` is the last one that is done."""
        self.step = self.step if step is None else step
        self._moves += 1

    @contextmanager
    def file_work(self, what: str) -> Iterator[None]:
        """Marks the time in which this process reads or writes files, while the others may have to wait for it."""
        before, self._busy = self._busy, what
        try:
            yield
        finally:
            self._busy = before
            self.progress()

    def of_leader(self, name: str, compute: Callable[[], Any]) -> Any:
        """Returns what `compute` returns on the leader, as plain JSON, on all processes. Collective.

        Args:
            name: different for each use in a run.
        """
        if self._store is None:
            return compute()
        if self.leads:
            with self.file_work(name):
                value = compute()
            self._store.set(f"word/{name}", json.dumps(value))
            return value
        return json.loads(self._wait(f"word/{name}"))

    def agree(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Compares what must be equal on all processes. Collective.

        Args:
            facts: by kind (settings, data, code ...) and key, as plain JSON.

        Raises:
            PeerError: something differs; each key is listed with its values by rank.
        """
        if self._store is None:
            return
        mine = {f"{kind}: {key}": json.dumps(value) for kind, group in facts.items() for key, value in group.items()}
        self._store.set(f"facts/{self.rank}", json.dumps(mine))
        problem = self.of_leader("agreement", lambda: self._disagreement(mine))
        if problem:
            raise PeerError(problem)

    def _disagreement(self, mine: Mapping[str, str]) -> str:
        values: dict[str, dict[str, list[int]]] = {}
        for rank in range(self.size):
            facts = mine if rank == 0 else json.loads(self._wait(f"facts/{rank}"))
            for key in {*mine, *facts, *values}:
                values.setdefault(key, {}).setdefault(facts.get(key, "absent"), []).append(rank)
        differing = {key: by_value for key, by_value in sorted(values.items()) if len(by_value) > 1}
        if not differing:
            return ""
        lines = [
            f"  {key}: " + ", ".join(f"{value} on rank {_ranks(ranks)}" for value, ranks in by_value.items())
            for key, by_value in differing.items()
        ]
        return "\n".join(["the processes of this run disagree; start all with the same command and files", *lines])

    def _wait(self, key: str) -> str:
        """Waits for a word of another process for as long as nobody fails; the monitor knows whether anybody does."""
        assert self._store is not None
        assert self._monitor is not None
        while True:
            with contextlib.suppress(dist.DistStoreError):
                self._store.wait([key], timedelta(seconds=2))
                return str(self._store.get(key).decode())
            if self._monitor.failure is not None:
                raise PeerError(self._monitor.failure)

    def write_stacks_to(self, folder: Path) -> None:
        """Says where this process writes its stacks if the run hangs."""
        if self._monitor is not None:
            self._monitor.stacks.open(folder / f"stacks-rank-{self.rank:04d}.txt")

    def _let_go(self) -> None:
        """Gives the others time to read why this process ends: the store may end with it."""
        assert self._store is not None
        assert self._monitor is not None
        deadline = time.monotonic() + _WORDS_TAKE
        with contextlib.suppress(dist.DistError, RuntimeError):
            while self.leads and time.monotonic() < deadline:
                if self._store.add("heard", 0) + self._monitor.dead_neighbours() >= self.size:
                    break
                time.sleep(0.02)

    def _leave(self) -> None:
        """Parts when all are done, so that nobody takes the end of another for a failure."""
        assert self._store is not None
        assert self._monitor is not None
        self._store.set(f"left/{self.rank}", "")
        deadline = time.monotonic() + 60
        try:
            for rank in range(self.size):
                while not self._store.check([f"left/{rank}"]):
                    if self._monitor.failure is not None:
                        raise PeerError(self._monitor.failure)
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.02)
            self._monitor.stop()
            # The leader holds the store: it goes last.
            self._store.add("gone", 1)
            while self.leads and self._store.add("gone", 0) < self.size and time.monotonic() < deadline:
                time.sleep(0.02)
        except (dist.DistError, RuntimeError):
            self._monitor.stop()


class _Monitor(threading.Thread):
    """Tells the others how this process is and looks after them. It has a connection of its own to the store."""

    def __init__(self, peers: Peers, store: Store) -> None:
        super().__init__(name="peers", daemon=True)
        self.failure: str | None = None
        self._peers = peers
        self._store = store
        self._interval = min(1.0, peers.hang_timeout / 10)
        self._over = threading.Event()
        self._hangs = self._heard_failure = False
        self._places: dict[int, Mapping[str, Any]] = {}
        self._beats: dict[int, Mapping[str, Any]] = {}
        self._heard = {rank: time.monotonic() for rank in range(peers.size)}
        self._moved = time.monotonic()
        self._parent = int(os.environ.get("TENCENTPRETRAIN_PARENT", "0"))
        self.stacks = StackFile()

    def run(self) -> None:
        beats = 0
        while not self._over.wait(self._interval if beats else 0):
            beats += 1
            try:
                self._tell(beats)
                self._look()
            except (dist.DistError, RuntimeError):
                if self._over.is_set():
                    return
                self._fail(self._lost_leader())
            if self.failure is not None:
                self._see_the_end()
                return

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
        deadline = time.monotonic() + _WORDS_TAKE
        while self.failure is None and time.monotonic() < deadline:
            try:
                self.failure = self._first_failure() or self._death()
            except (dist.DistError, RuntimeError):
                self.failure = self._lost_leader()
            time.sleep(0.05)
        if self.failure is None and isinstance(error, RuntimeError) and "gloo" in str(error).lower():
            self.failure = f"{self._who(self._peers.rank)} lost a process after step {self._peers.step}: {_line(error)}"
        if self.failure is None:
            self._record(self._own(error))
            return None
        self._record(self.failure)
        return PeerError(self.failure)

    def _tell(self, beats: int) -> None:
        peers = self._peers
        if beats == 1:
            place = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
            self._store.set(f"place/{peers.rank}", json.dumps(place))
        beat = {"beats": beats, "step": peers.step, "moves": peers._moves, "busy": peers._busy, "at": standing()}
        self._store.set(f"beat/{peers.rank}", json.dumps(beat))
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
        return f"{self._who(self._peers.rank)} {what} (last step {self._peers.step})"

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
        own = _machine()
        for rank in range(self._peers.size):
            place = self._place(rank) if rank != self._peers.rank else None
            if place is not None and place["machine"] == own:
                yield rank, place["pid"]

    def dead_neighbours(self) -> int:
        """Returns how many of the other processes of this machine have ended."""
        return sum(not is_alive(pid) for _, pid in self._neighbours())

    def _death(self) -> str | None:
        """Returns who of this machine has ended without having left the run."""
        for rank, pid in self._neighbours():
            if is_alive(pid) or self._store.check([f"left/{rank}"]):
                continue
            end = end_of(rank, pid)
            return f"{self._who(rank)} ended without a word{end} (last step {self._last_step(rank)})"
        return None

    def _last_step(self, rank: int) -> int:
        with contextlib.suppress(dist.DistError, RuntimeError):
            if self._store.check([f"beat/{rank}"]):
                self._beats[rank] = json.loads(self._store.get(f"beat/{rank}"))
        return max(int(self._beats[rank]["step"]) if rank in self._beats else 0, self._peers.step)

    def _lost_leader(self) -> str:
        with contextlib.suppress(dist.DistError, RuntimeError):
            if death := self._death():
                return death
        place = self._places.get(0)
        who = f"rank 0 on {place['host']} (process {place['pid']})" if place else "rank 0"
        end = end_of(0, place["pid"]) if place and not is_alive(place["pid"]) else ""
        return f"{who}, which holds the run together, does not answer any more{end} (last step {self._peers.step})"

    def _hang(self) -> str | None:
        """Returns what to say if no process gets on. The leader watches all, the others the leader."""
        now = time.monotonic()
        for rank in range(self._peers.size) if self._peers.leads else (0, self._peers.rank):
            if not self._store.check([f"beat/{rank}"]):
                continue
            beat = json.loads(self._store.get(f"beat/{rank}"))
            last = self._beats.get(rank, {})
            if beat["beats"] != last.get("beats"):
                self._heard[rank] = now
            if beat["moves"] != last.get("moves"):
                self._moved = now
            self._beats[rank] = beat
        limit = self._peers.hang_timeout
        works = any(
            beat["busy"] and now - self._heard[rank] < limit / 2 + 2 for rank, beat in self._beats.items()
        )  # sign of life from one that reads or writes files
        leader_is_silent = now - self._heard[0] > limit
        if not leader_is_silent and (now - self._moved < (_FILE_WORK * limit if works else limit)):
            return None
        if not self._peers.leads and not leader_is_silent and now - self._moved < limit + 3 * self._interval:
            return None  # the leader sees more and speaks first
        places = []
        for rank, beat in self._beats.items():
            silence = now - self._heard[rank]
            silent = f" (no sign of life for {silence:.0f} seconds)" if silence > 3 * self._interval + 1 else ""
            places.append(f"\n  rank {rank}: after step {beat['step']} in {beat['at']}{silent}")
        return f"the run hangs: no process got on for {limit:g} seconds{''.join(places)}"

    def _see_the_end(self) -> None:
        """Lets the main thread end by itself; ends the process if it does not, at once if it hangs."""
        if self._hangs:
            self._dump_stacks()
        else:
            self._over.wait(_ENDING_TAKES)
            if self._over.is_set():
                return
        logger.error("%s", self.failure)
        tell_launcher(f"{self.failure}")
        sys.stderr.flush()
        os._exit(PeerError.exit_code)

    def _dump_stacks(self) -> None:
        self.stacks.dump()
        with contextlib.suppress(dist.DistError, RuntimeError):
            silent = [
                pid
                for rank, pid in self._neighbours()
                if time.monotonic() - self._heard[rank] > self._peers.hang_timeout / 2
            ]
            time.sleep(2 * self._interval)  # the others hear of it
            wake_and_dump([pid for pid in silent if is_alive(pid)])


def standing() -> str:
    """Returns where the main thread is: the innermost line of this package."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = frame.f_code.co_filename
        if "tencentpretrain" in path:
            return f"{'/'.join(Path(path).parts[-2:])}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "no line of this package"


def is_alive(pid: int) -> bool:
    """Returns whether a process of this machine runs or is stopped; a dead one its parent has not seen is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZXx"
    except FileNotFoundError:
        return False
    except (OSError, IndexError):
        return True


def end_of(rank: int, pid: int) -> str:
    """Returns how a process of this machine ended, as far as the launcher or the system tell."""
    folder = os.environ.get("TENCENTPRETRAIN_EXITS")
    deadline = time.monotonic() + (1 if folder else 0)
    while True:
        code: int | None = None
        with contextlib.suppress(OSError, ValueError, IndexError):
            if folder:
                code = int((Path(folder) / f"exit-{rank}").read_text())
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[-1])
            code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if code is not None:
            return f", {how_ended(code)}"
        if time.monotonic() > deadline:
            return ": killed, out of memory, or crashed"
        time.sleep(0.05)


def _machine() -> str:
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _of_a_peer(error: BaseException) -> bool:
    """Whether an error may be the effect of another process's end."""
    if isinstance(error, TencentPretrainError) or not isinstance(error, (RuntimeError, OSError)):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in _SIGNS_OF_A_LOST_PEER)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
