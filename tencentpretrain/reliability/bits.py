"""R4, R5: checkpoints that were cut or in which a bit has flipped."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tencentpretrain.checkpoint.manifest import MANIFEST, verify
from tencentpretrain.checkpoint.training import CheckpointFolder, TrainingState, load
from tencentpretrain.errors import CheckpointMismatch
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs, small_runs
from tencentpretrain.reliability.row import Row, Scale
from tencentpretrain.reliability.small_runs import Plan

_GIGABYTE = 1 << 30


def _trained(folder: Path) -> CheckpointFolder:
    """Trains a run that leaves two checkpoints."""
    small_runs.run_alone(folder / "run", Plan(steps=4))
    return CheckpointFolder(runs.checkpoints_of(folder / "run"))


def _refusal(path: Path) -> str:
    try:
        verify(path)
    except CheckpointMismatch as error:
        return str(error)
    return ""


@ROWS.register("R4")
def check_truncation(scale: Scale, folder: Path) -> Row:
    """Every file of a checkpoint at random lengths and at none; then a start that finds it so."""
    checkpoints = _trained(folder)
    older, newest = (checkpoints.path(step) for step in checkpoints.steps())
    draw = random.Random(4)
    cuts, wrong = 0, []
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for length in [0, *draw.sample(range(1, len(whole)), 20)]:
            cuts += 1
            file.write_bytes(whole[:length])
            message = _refusal(newest)
            said = str(file) in message
            if file.name != MANIFEST:
                said = said and bool(re.search(f"expected {len(whole)} bytes, found {length}$", message))
            if not said:
                wrong.append(f"{file.name} of {length} bytes: {message or 'accepted'}")
        file.write_bytes(whole)
    starts = 0
    for name in sorted(entry.name for entry in newest.iterdir()):
        place = folder / "copy" / name
        runs.copy_run(folder / "run", place)
        harmed = runs.checkpoints_of(place) / newest.name / name
        harmed.write_bytes(harmed.read_bytes()[: harmed.stat().st_size // 2])
        starts += 1
        codes = small_runs.run(place, Plan(steps=4))
        taken, aside = Path(f"{place}.from").read_text(), runs.checkpoints_of(place) / "damaged" / newest.name
        if any(codes) or taken != older.name or not aside.is_dir():
            wrong.append(f"start with {name} cut: exit {codes}, took {taken}")
    return Row(
        name="R4",
        promised="each file cut at 20 lengths and at 0: refused with file, expected and found size; the checkpoint "
        "before is used, the bad one kept aside: 100 %",
        reached=f"{cuts} cuts, {starts} starts, {len(wrong)} not as promised"
        + "".join(f"; {one}" for one in wrong[:3]),
        passed=not wrong,
    )


@ROWS.register("R5")
def check_flips(scale: Scale, folder: Path) -> Row:
    """Single bits in all files, each read as a start reads them; and what that reading costs."""
    checkpoints = _trained(folder)
    newest = checkpoints.path(checkpoints.steps()[-1])
    files = sorted(newest.iterdir())
    count = 10_000 if scale == "full" else 500
    silent = _flip(newest, files, count)
    size = _GIGABYTE if scale == "full" else 1 << 25
    reading, elapsed, loading = _cost(folder / "large", size)
    return Row(
        name="R5",
        promised="10,000 single-bit flips over all files found before the first update; verification below 10 % of "
        "load time at 1 GB, or below 1 s",
        reached=f"{count - len(silent)}/{count} flips found in {len(files)} files; verification of {size / 1e9:.2f} GB "
        f"takes {reading:.2f} s of processor time ({elapsed:.2f} s passed), loading {loading:.2f} s"
        + "".join(f"; {one}" for one in silent[:3]),
        passed=not silent and (reading < 0.1 * loading or reading < 1.0),
    )


def _flip(path: Path, files: Sequence[Path], count: int) -> list[str]:
    """Flips bits one at a time and returns those that nobody noticed."""
    draw, silent = random.Random(5), []
    for number in range(count):
        file = files[number % len(files)]
        position, bit = draw.randrange(file.stat().st_size), draw.randrange(8)
        with file.open("r+b", buffering=0) as opened:
            opened.seek(position)
            byte = opened.read(1)
            opened.seek(position)
            opened.write(bytes([byte[0] ^ 1 << bit]))
            if str(file) not in _refusal(path):
                silent.append(f"{file.name} byte {position} bit {bit}")
            opened.seek(position)
            opened.write(byte)
    return silent


def _cost(folder: Path, size: int) -> tuple[float, float, float]:
    """Returns the processor's seconds and those that passed to verify a checkpoint, and the processor's to load it.

    It is found in the page cache. Other work on the machine does not count against the promise.
    """
    rows = size // 3 // 8 // 4096
    model = {f"layer.{number}.weight": torch.rand(rows, 1024) for number in range(8)}
    moments = {f"{name}/{what}": tensor + 1 for name, tensor in model.items() for what in ("exp_avg", "exp_avg_sq")}
    path = CheckpointFolder(folder).save(1, TrainingState(model=model, optimizer=moments, values={}))
    began, busy = time.perf_counter(), time.process_time()
    verify(path)
    elapsed, verified = time.perf_counter() - began, time.process_time()
    state = load(path)
    for target, source in ((model, state.model), (moments, state.optimizer)):
        for name, tensor in target.items():
            tensor.copy_(source[name])
    return verified - busy, elapsed, time.process_time() - verified
