"""What the processes of a run know of each other besides sums: who leads, who failed, who hangs, who disagrees.

It goes through the store at which the processes met, never through sums on the device, so it works while they do not. A
thread of each process tells every second how far the process is and looks after the others.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from tencentpretrain.errors import PeerError
from tencentpretrain.train.monitor import WORDS_TAKE, Monitor, Process


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
        self._process = Process(rank=rank, size=size, hang_timeout=hang_timeout)
        self._monitor: Monitor | None = None
        self._store: Store | None = None

    def __enter__(self) -> Peers:
        if self.size > 1:
            self._store = PrefixStore("peers", dist.distributed_c10d._get_default_store())
            self._monitor = Monitor(self._process, self._store.clone())
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
        self._process.step = self._process.step if step is None else step
        self._process.moves += 1

    @contextmanager
    def file_work(self, what: str) -> Iterator[None]:
        """Marks the time in which this process reads or writes files, while the others may have to wait for it."""
        before, self._process.busy = self._process.busy, what
        try:
            yield
        finally:
            self._process.busy = before
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
        deadline = time.monotonic() + WORDS_TAKE
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


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
