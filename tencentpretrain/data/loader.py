"""The endless stream of batches: drawn in the background, restarted exactly from one integer."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from tencentpretrain.data.arrays import BatchArrays
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.samples import Dataset, SampleStream, check_dataset
from tencentpretrain.errors import ResourceError, TencentPretrainError

if TYPE_CHECKING:
    from tencentpretrain.data.batch import Batch

_FOR_THE_RUN = (signal.SIGINT, signal.SIGTERM)
PREFETCHED_BATCHES = 4
"""Batches that each worker keeps ready."""


class Loader:
    """An endless iterator of batches.

    The global batch g is the samples from g * batch_size * world_size onwards, dealt to the ranks in turn. Epochs
    follow each other without a gap: every batch has batch_size samples, one may hold the end of an epoch and the
    beginning of the next, and every epoch has every sample exactly once. What a batch holds does not depend on
    `num_workers`, nor on where the run was restarted.

    Attributes:
        position: the global index of the first sample that has not been handed out to any rank: give it as `start`
            to continue.
        waiting_seconds: how long iteration has waited for data in all.
    """

    def __init__(
        self,
        store: Dataset,
        processor: Processor[Any, Any],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 1,
    ) -> None:
        """Args:

        store: a data set of `open_dataset`.
        num_workers: processes that draw samples; 0 draws them when they are asked for.

        Raises:
            DataFormatError: data set, processor and tokenizer do not belong together, or there is no sample.
        """
        check_dataset(store, processor)
        self.position = start
        self.waiting_seconds = 0.0
        self._batch_size = batch_size
        self._rank, self._world_size = rank, world_size
        self._num_workers = num_workers
        self._stream = SampleStream(store, processor, seed=seed, shuffle=shuffle)
        self._stream.epoch_sizes()

    @property
    def epoch_size(self) -> int:
        """The number of samples of the first epoch."""
        return self._stream.epoch_sizes()[0]

    @property
    def epoch(self) -> int:
        """The epoch of the next sample."""
        return self._stream.locate(self.position)[0]

    @property
    def skipped(self) -> int:
        """The number of records that give no sample because they are too long."""
        return self._stream.skipped

    def __iter__(self) -> Iterator[Batch]:
        step = self._batch_size * self._world_size
        source = self._prefetched(step) if self._num_workers else self._drawn(step)
        with contextlib.closing(source):
            while True:
                began = time.perf_counter()
                batch = next(source).to_batch()
                self.waiting_seconds += time.perf_counter() - began
                self.position += step
                yield batch

    def _drawn(self, step: int) -> Generator[BatchArrays, None, None]:
        start = self.position
        while True:
            yield self._stream.batch(start, self._batch_size, self._rank, self._world_size)
            start += step

    def _prefetched(self, step: int) -> Generator[BatchArrays, None, None]:
        """Takes batches from the workers in turn: worker w draws the batches w, w + num_workers, ..."""
        share = (self._batch_size, self._rank, self._world_size)
        workers = [
            _Worker(self._stream, self.position + number * step, step * self._num_workers, share, number)
            for number in range(self._num_workers)
        ]
        try:
            while True:
                for worker in workers:
                    yield worker.receive()
        finally:
            for worker in workers:
                worker.stop()


class _Worker:
    """A process that draws batches ahead."""

    def __init__(self, stream: SampleStream, start: int, step: int, share: tuple[int, int, int], number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._number = number
        self._connection, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_draw, args=(stream, start, step, share, theirs), daemon=True)
        # Launchers and schedulers send signals to every process of a run; the loader's go on until the run has saved.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_RUN)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def receive(self) -> BatchArrays:
        """Returns the next batch.

        Raises:
            ResourceError: the process has died.
            TencentPretrainError: what went wrong in it.
        """
        try:
            content = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise ResourceError(
                f"loader process {self._number} ended with exit code {self._process.exitcode}"
                f"{' (out of memory?)' if self._process.exitcode == -signal.SIGKILL else ''}; "
                "run the same command again"
            ) from None
        if isinstance(content, BaseException):
            raise content
        assert isinstance(content, BatchArrays)
        return content

    def stop(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.kill()
        self._process.join(5)


def _draw(stream: SampleStream, start: int, step: int, share: tuple[int, int, int], connection: Connection) -> None:
    """Draws the batches at start, start + step, ... and keeps a few ready until the other end is gone."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # see train.stacks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    ready: queue.Queue[Any] = queue.Queue(PREFETCHED_BATCHES)

    def send() -> None:
        while True:
            try:
                connection.send(ready.get())
            except (BrokenPipeError, ConnectionResetError):  # the run has ended, in whatever way
                os._exit(0)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        while True:
            ready.put(stream.batch(start, *share))
            start += step
    except TencentPretrainError as error:
        ready.put(error)
    except Exception:
        ready.put(RuntimeError(f"a loader process failed:\n{traceback.format_exc()}"))
    sender.join()


def _end_with_parent() -> None:
    """Ends this process when the run's has gone, however deep in a sample it is."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)
