"""Makes shards on the machines of a Ray cluster; the work of a lost worker is done again by another one."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tencentpretrain.data.corpus import Corpus
from tencentpretrain.data.premises import Premises, check_answer
from tencentpretrain.data.shards import Ledger, Progress, ShardBuilder, ShardJob, ShardTask
from tencentpretrain.errors import ResourceError, TencentPretrainError

ATTEMPTS = 3
"""How many workers may be lost over one shard."""

START_SECONDS = 120.0
"""How long the cluster may have no worker at all."""

_CONNECT_SECONDS = 10.0


def run_on_ray(
    job: ShardJob, corpus: Corpus, tasks: Iterator[ShardTask], num_workers: int, progress: Progress, *, address: str
) -> Iterator[Ledger]:
    """Makes the shards of all tasks and yields each ledger as it is published, in any order.

    Each worker compares its machine with this one before it gets work, and the checksum of each range it has read
    before it publishes. A task is taken from the iterator only when a worker is free for it.

    Args:
        num_workers: on all machines together; each occupies one CPU of the cluster.
        address: host:port of the cluster's head, or "auto".

    Raises:
        ResourceError: no cluster, no worker, a folder that is not shared, or a shard over which three workers were
            lost. The shards that are published stay.
        TencentPretrainError: what a worker raised.
    """
    job = replace(job, folder=job.folder.resolve())
    with _connected(address) as ray:
        premises = Premises.here(job, corpus)
        crew: _Crew | None = None
        try:
            crew = _Crew(ray, job, premises, num_workers)
            yield from crew.run((_portable(task) for task in tasks), progress)
        finally:
            (job.folder / premises.mark).unlink(missing_ok=True)
            if crew is not None:
                crew.close()


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Joins the cluster as a driver, and leaves it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if address != "auto":
        host, _, port = address.rpartition(":")
        try:  # Ray itself would try for minutes, and then end the process
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ResourceError(
                f"no Ray cluster answers at {address} ({error}); start one there with: {_start_command(port)}"
            ) from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        reason = str(error).partition("\n")[0]
        raise ResourceError(
            f"this machine belongs to no Ray cluster that runs ({reason}); start one with: {_start_command('6379')}"
        ) from None
    except RuntimeError as error:  # another version of Ray or Python
        raise ResourceError(f"the Ray cluster at {address} cannot be used: {error}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _start_command(port: str) -> str:
    return f"ray start --head --port {port} --include-dashboard=false --disable-usage-stats"


def _portable(task: ShardTask) -> ShardTask:
    """Adds what a worker of another machine needs: the whole path, and the checksum of what it must read."""
    checksum = task.source_crc32
    if checksum is None:
        checksum = 0
        with task.path.open("rb") as file:
            file.seek(task.begin)
            for position in range(task.begin, task.end, 1 << 20):
                checksum = zlib.crc32(file.read(min(1 << 20, task.end - position)), checksum)
    return replace(task, path=task.path.resolve(), source_crc32=checksum)


class _Builder:
    """A worker, as Ray runs it. It raises nothing: what goes wrong is an answer."""

    def __init__(self, job: ShardJob, premises: Premises, folder: str) -> None:
        self._job, self._premises, self._folder = job, premises, folder
        self._builder: ShardBuilder | None = None

    def prepare(self) -> tuple[str, str | Exception]:
        """Returns the host, and the answer to the mark or what is wrong."""
        host = socket.gethostname()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one worker per CPU is enough
        with contextlib.suppress(OSError):  # so that relative paths of vocabularies mean the same as in preprocess.py
            os.chdir(self._folder)
        try:
            self._builder, answer = self._premises.check(self._job)
        except Exception as error:
            return host, _as_answer(error, host)
        return host, answer

    def build(self, task: ShardTask) -> Iterator[tuple[str, Any]]:
        """Yields progress, then a ledger or an error."""
        assert self._builder is not None
        try:
            steps = self._builder.steps(task)
            while True:
                try:
                    yield "progress", next(steps)
                except StopIteration as end:
                    yield "done", end.value
                    return
        except Exception as error:
            yield "error", _as_answer(error, socket.gethostname())


def _as_answer(error: Exception, host: str) -> Exception:
    if isinstance(error, TencentPretrainError):
        return error
    return RuntimeError(f"a worker on {host} failed: {error}\n{''.join(traceback.format_exception(error))}")


@dataclass(kw_only=True, eq=False)
class _Hand:
    """A worker, as the driver sees it."""

    number: int
    actor: Any
    answer: Any
    """What is awaited: the result of `prepare`, or what `build` yields; None: the worker is free."""
    host: str | None = None
    task: ShardTask | None = None
    done: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Bytes, lines and tokens of the task."""

    def __str__(self) -> str:
        return f"worker {self.number}" + (f" on {self.host}" if self.host else "")


class _Crew:
    def __init__(self, ray: Any, job: ShardJob, premises: Premises, num_workers: int) -> None:
        self._ray, self._job = ray, job
        self._make = ray.remote(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD")(_Builder)
        self._arguments = (ray.put(job), ray.put(premises), str(Path.cwd()))
        self._hired = 0
        self._failed_starts = 0
        self._losses: dict[int, int] = {}
        self._lost: deque[ShardTask] = deque()
        self._hands = [self._hire() for _ in range(num_workers)]
        num_cpus = int(ray.cluster_resources().get("CPU", 0))
        if num_cpus < num_workers:
            _say(f"the Ray cluster has {num_cpus} CPUs for {num_workers} workers; the others wait for more machines")

    def run(self, tasks: Iterator[ShardTask], progress: Progress) -> Iterator[Ledger]:
        exhausted = False
        alive = time.monotonic()
        while True:
            for hand in [hand for hand in self._hands if hand.answer is None]:
                task = self._lost.popleft() if self._lost else None if exhausted else next(tasks, None)
                if task is None:
                    exhausted = True
                    break
                hand.task, hand.done = task, [0, 0, 0]
                hand.answer = hand.actor.build.options(num_returns="streaming").remote(task)
            if exhausted and not self._lost and not any(hand.task for hand in self._hands):
                return
            awaited = {hand.answer: hand for hand in self._hands if hand.answer is not None}
            ready, _ = self._ray.wait(list(awaited), num_returns=1, timeout=1.0)
            if any(hand.host for hand in self._hands):
                alive = time.monotonic()
            elif time.monotonic() - alive > START_SECONDS:
                raise ResourceError(
                    f"the Ray cluster has started no worker for {START_SECONDS:.0f} s (free: "
                    f"{self._ray.available_resources().get('CPU', 0):.0f} CPUs); see `ray status`, and add machines "
                    "with: ray start --address HEAD:PORT. Finished shards are kept"
                )
            for answer in ready:
                if ledger := self._receive(awaited[answer], progress):
                    yield ledger

    def _receive(self, hand: _Hand, progress: Progress) -> Ledger | None:
        exceptions = self._ray.exceptions
        try:
            content = self._ray.get(hand.answer if hand.task is None else next(hand.answer))
        except exceptions.RayTaskError as error:
            raise RuntimeError(f"{hand} failed: {error}") from None
        except (exceptions.RayError, StopIteration) as error:
            self._replace(hand, _reason(error), progress)
            return None
        kind, value = content
        if hand.task is None:
            hand.host, hand.answer = kind, None
            if isinstance(value, Exception):
                raise value
            check_answer(self._job, value, hand.host or "")
        elif kind == "progress":
            hand.done = [before + more for before, more in zip(hand.done, value, strict=True)]
            progress(*value)
        elif kind == "error":
            raise value
        else:
            hand.task = hand.answer = None
            ledger: Ledger = value
            return ledger
        return None

    def _replace(self, hand: _Hand, reason: str, progress: Progress) -> None:
        """Gives the task of a lost worker back and hires another."""
        self._dismiss(hand)
        self._hands.remove(hand)
        if hand.task is None:
            self._failed_starts += 1
            if self._failed_starts >= ATTEMPTS:
                raise ResourceError(
                    f"{self._failed_starts} workers of the Ray cluster could not start, the last one because: {reason}"
                )
        else:
            task, lines = hand.task, hand.done[1]
            progress(*(-count for count in hand.done))
            self._losses[task.index] = self._losses.get(task.index, 0) + 1
            lost = f"{hand} was lost at {task}, after line {lines:,} of it ({reason})"
            if self._losses[task.index] >= ATTEMPTS:
                raise ResourceError(
                    f"{lost}, as {ATTEMPTS - 1} workers before it; out of memory? Finished shards are kept: run the "
                    "same command again to make the others"
                )
            _say(f"{lost}; another worker makes it again")
            self._lost.append(task)
        self._hands.append(self._hire())

    def _hire(self) -> _Hand:
        actor = self._make.remote(*self._arguments)
        self._hired += 1
        return _Hand(number=self._hired - 1, actor=actor, answer=actor.prepare.remote())

    def _dismiss(self, hand: _Hand) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(hand.actor)

    def close(self) -> None:
        """Ends all workers; the shards they are at stay unpublished."""
        for hand in self._hands:
            self._dismiss(hand)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if line.startswith(("ModuleNotFoundError", "ImportError")):
            return f"{line}; install the same packages on every machine"
    return f"{type(error).__name__}: {lines[0] if lines else 'its connection ended'}"[:300]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
