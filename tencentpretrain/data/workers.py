"""A few processes that each make shards; a dead one is reported with what it was doing."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tencentpretrain.data.shards import Ledger, Progress, ShardBuilder, ShardJob, ShardTask
from tencentpretrain.errors import ResourceError, TencentPretrainError


def run_tasks(job: ShardJob, tasks: Iterator[ShardTask], num_workers: int, progress: Progress) -> Iterator[Ledger]:
    """Makes the shards of all tasks and yields each ledger as it is published, in any order.

    A task is taken from the iterator only when a worker is free for it.

    Raises:
        ResourceError: a worker died; the others have finished their shards, and what is published stays.
        TencentPretrainError: what a worker raised.
    """
    if num_workers == 1:
        builder = ShardBuilder(job)
        for task in tasks:
            yield builder.build(task, progress)
        return
    pool = _Pool(job, num_workers)
    try:
        yield from pool.run(tasks, progress)
    finally:
        pool.close()


class _Worker:
    def __init__(self, context: Any, job: ShardJob, number: int) -> None:
        self.number = number
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(job, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.task: ShardTask | None = None
        self.lines = 0

    def assign(self, task: ShardTask) -> None:
        self.task, self.lines = task, 0
        with contextlib.suppress(OSError):  # a dead worker shows when its answer is received
            self.connection.send(task)

    def death(self) -> ResourceError:
        """Says how the worker ended and on what."""
        self.process.join(5)
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory? use fewer processes)" if code == -signal.SIGKILL else ""
        place = f" at {self.task}, after line {self.lines:,} of it" if self.task else ""
        return ResourceError(
            f"worker {self.number} (process {self.process.pid}) {how}{hint}{place}; "
            "finished shards are kept: run the same command again to make the others"
        )


class _Pool:
    def __init__(self, job: ShardJob, num_workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers = [_Worker(context, job, number) for number in range(num_workers)]

    def run(self, tasks: Iterator[ShardTask], progress: Progress) -> Iterator[Ledger]:
        busy: list[_Worker] = []
        death: ResourceError | None = None
        for worker in self._workers:
            if task := next(tasks, None):
                worker.assign(task)
                busy.append(worker)
        while busy:
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                try:
                    kind, content = worker.connection.recv()
                except (EOFError, OSError):
                    # The others finish what they are at, so that only the shard of the dead one is lost.
                    death = death or worker.death()
                    busy.remove(worker)
                    continue
                if kind == "progress":
                    worker.lines += content[1]
                    progress(*content)
                elif kind == "error":
                    raise content
                else:
                    yield content
                    worker.task = None
                    if death is None and (task := next(tasks, None)):
                        worker.assign(task)
                    else:
                        busy.remove(worker)
        if death is not None:
            raise death

    def close(self) -> None:
        """Ends all workers; one in the middle of a shard is stopped, its shard stays unpublished."""
        for worker in self._workers:
            worker.connection.close()
            if worker.task is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _work(job: ShardJob, connection: Connection) -> None:
    """The life of a worker: receives tasks, sends progress, ledgers, or one error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    try:
        send: Callable[[Any], None] = connection.send
        builder = ShardBuilder(job)
        while True:
            task = connection.recv()
            send(("done", builder.build(task, lambda *done: send(("progress", done)))))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except TencentPretrainError as error:
        connection.send(("error", error))
    except Exception:
        connection.send(("error", RuntimeError(f"a worker failed:\n{traceback.format_exc()}")))
