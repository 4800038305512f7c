"""R13: a state saved on some processes continues on any other number, on every engine."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs
from tencentpretrain.reliability.layouts import ARRANGEMENTS, Arrangement, deviation, differences, fork, train
from tencentpretrain.reliability.order import data_of
from tencentpretrain.reliability.row import Row, Scale

_SIZES = (1, 2, 4)
_TOLERANCE = 1e-5
_GLOBAL_BATCH = 4


@ROWS.register("R13")
def check_sizes(scale: Scale, folder: Path) -> Row:
    """Save at 1, 2, 4 processes, resume at 1, 2, 4, on each engine and from one engine to the next."""
    full = scale == "full"
    kind, before, after = "gpt2", (25 if full else 4), (50 if full else 6)
    engines = ("DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3") if full else ("DDP", "ZeRO-2")
    pairs = [(first, second) for first, second in itertools.product(_SIZES, _SIZES)]
    if not full:
        pairs = [(1, 2), (2, 1)]
    reference = _train(_place("one process", 1), kind, range(after), folder / "reference")["losses"]
    saved: dict[tuple[str, int], Path] = {}
    runs_made = close = same_state = same_bits = at_one_size = 0
    worst = 0.0
    for number, engine in enumerate(engines):
        for first, second in pairs:
            if (engine, first) not in saved:
                saved[engine, first] = folder / f"{engine}-{first}"
                _train(_place(engine, first), kind, range(before), saved[engine, first])
            # Every second engine takes up the state of the one before it.
            source = saved.get((engines[number - 1], first)) if number % 2 else None
            start = source or saved[engine, first]
            untouched = folder / "untouched"
            place = _place(engine, second)
            _train(place, kind, range(0), untouched, load=start)
            same_state += not list(differences(start, untouched))
            losses = _train(place, kind, range(before, after), folder / "resumed", load=start)["losses"]
            found = deviation(losses, reference[before:])
            runs_made, close, worst = runs_made + 1, close + (found <= _TOLERANCE), max(worst, found)
            if first == second and source is None:
                at_one_size += 1
                whole = _train(place, kind, range(after), folder / "whole")["losses"]
                same_bits += losses == whole[before:]
    equal_samples, steps = _same_samples(folder, 40 if full else 8)
    passed = close == same_state == runs_made and same_bits == at_one_size and equal_samples == steps
    return Row(
        name="R13",
        promised="same samples per step, states equal after gathering, loss within 1e-5; bitwise at one world size",
        reached=(
            f"{close}/{runs_made} continued within 1e-5 (worst {worst:.1e}), {same_state}/{runs_made} states equal "
            f"to the bit after loading, {same_bits}/{at_one_size} bitwise where the world size stays, samples of "
            f"{equal_samples}/{steps} steps equal; engines {', '.join(engines)}"
        ),
        passed=passed,
    )


def _place(engine: str, size: int) -> Arrangement:
    name = "one process" if size == 1 and engine in ("DDP", "FSDP2") else engine
    return next(place for place in ARRANGEMENTS if (place.name, place.world_size) == (name, size))


def _train(place: Arrangement, kind: str, steps: Sequence[int], save: Path, load: Path | None = None) -> dict[str, Any]:
    course: dict[str, Any] = fork(
        place.world_size, lambda rank: vars(train(kind, place.make(), steps, load=load, save=save))
    )
    return course


def _same_samples(folder: Path, steps: int) -> tuple[int, int]:
    """Counts the steps whose global batch holds the same samples however many processes share it."""
    flags = runs.prepare("lm", folder / "samples", steps, steps, lines=60, longest=20, batch_size=_GLOBAL_BATCH)
    by_size = []
    for size in _SIZES:
        share = [*flags, "--num_workers", "0", "--batch_size", str(_GLOBAL_BATCH // size)]
        drawn: list[Counter[bytes]] = [Counter() for _ in range(steps)]
        for rank in range(size):
            loader = data_of(share).loader(start=0, rank=rank, world_size=size)
            with closing(iter(loader)) as batches:  # type: ignore[type-var]
                for seen, batch in zip(drawn, batches, strict=False):
                    assert isinstance(batch.token_ids, torch.Tensor)
                    seen.update(row.numpy().tobytes() for row in batch.token_ids)
        by_size.append(drawn)
    return sum(all(other[step] == by_size[0][step] for other in by_size) for step in range(steps)), steps
