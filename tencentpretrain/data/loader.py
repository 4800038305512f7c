"""The stream of batches: seeded order, exact restart from one integer, shares for ranks."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tencentpretrain.data.arrays import BatchArrays
from tencentpretrain.data.processor import Plan, Processor
from tencentpretrain.data.random import ORDER, SAMPLE, KeyedGenerator
from tencentpretrain.data.store import Store
from tencentpretrain.errors import DataFormatError

if TYPE_CHECKING:
    from tencentpretrain.data.batch import Batch

PREFETCHED_BATCHES = 4
"""Batches that each worker keeps ready."""


class SampleStream:
    """Maps a global sample index to a sample: epochs stand one after the other, each in its own order."""

    def __init__(self, store: Store, processor: Processor[Any, Any], *, seed: int, shuffle: bool) -> None:
        self.store = store
        self.processor = processor
        self._shuffle = shuffle
        self._order_rng = KeyedGenerator(seed, ORDER, int(store.fingerprint[:12], 16))
        self._sample_rng = KeyedGenerator(seed, SAMPLE)
        self._sizes: list[int] = []
        self._plan: tuple[int, Plan] = (-1, Plan(size=0))
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def locate(self, index: int) -> tuple[int, int]:
        """Returns epoch and place in it of a global sample index."""
        sizes = self._cycle()
        rounds, rest = divmod(index, sum(sizes))
        epoch = rounds * len(sizes)
        while rest >= sizes[epoch % len(sizes)]:
            rest -= sizes[epoch % len(sizes)]
            epoch += 1
        return epoch, rest

    def __getitem__(self, index: int) -> Any:
        epoch, place = self.locate(index)
        plan = self._plan_of(epoch % len(self._sizes))
        row = int(self._order_of(epoch, len(plan))[place]) if self._shuffle else place
        rng = self._sample_rng.at(self.processor.draw_version(epoch), row)
        return self.processor.sample(self.store, plan, row, rng)

    def _cycle(self) -> list[int]:
        """The sizes of all different plans; after them the sizes repeat."""
        if not self._sizes:
            self._sizes = [len(self._plan_of(version)) for version in range(self.processor.num_plans)]
            if not sum(self._sizes):
                raise DataFormatError(f"{self.store.path}: the data set gives not a single sample")
        return self._sizes

    def _plan_of(self, version: int) -> Plan:
        if self._plan[0] != version:
            self._plan = (version, self.processor.plan(self.store, version))
        return self._plan[1]

    def _order_of(self, epoch: int, size: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            self._order = (epoch, self._order_rng.at(epoch, 0).permutation(size))
        return self._order[1]


class Loader:
    """An endless iterator of batches.

    The global batch g is the samples g * batch_size * world_size onwards, dealt to the ranks in turn. Epochs follow
    each other without a gap: every batch has batch_size samples, one may hold the end of an epoch and the beginning
    of the next, and every epoch has every sample exactly once.

    Attributes:
        position: the global index of the first sample that has not been handed out to any rank: give it as `start`
            to continue.
        waiting_seconds: how long `next` has waited for data in all.
    """

    def __init__(
        self,
        store: Store,
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
        self.position = start
        self.waiting_seconds = 0.0
        self._batch_size = batch_size
        self._rank, self._world_size = rank, world_size
        self._num_workers = num_workers
        self._stream = SampleStream(store, processor, seed=seed, shuffle=shuffle)
        self._stream.locate(0)

    def __iter__(self) -> Iterator[Batch]:
        source = self._prefetched() if self._num_workers else self._drawn(self.position)
        while True:
            began = time.perf_counter()
            arrays = next(source)
            batch = arrays.to_batch()
            self.waiting_seconds += time.perf_counter() - began
            self.position += self._batch_size * self._world_size
            yield batch

    def _drawn(self, start: int) -> Iterator[BatchArrays]:
        while True:
            indices = range(start + self._rank, start + self._batch_size * self._world_size, self._world_size)
            yield self._stream.processor.arrays([self._stream[index] for index in indices])
            start += self._batch_size * self._world_size

    def _prefetched(self) -> Iterator[BatchArrays]:
        ready: queue.Queue[BatchArrays | BaseException] = queue.Queue(PREFETCHED_BATCHES)
        ended = threading.Event()

        def put(item: BatchArrays | BaseException) -> None:
            while not ended.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for arrays in self._drawn(self.position):
                    put(arrays)
                    if ended.is_set():
                        return
            except BaseException as error:
                put(error)

        threading.Thread(target=work, daemon=True, name="loader").start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            ended.set()
