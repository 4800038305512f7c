"""R6, R7: checkpoints with wrong files are refused by name, and never lead to a fresh start by accident."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tencentpretrain.checkpoint.training import CheckpointFolder, verify
from tencentpretrain.errors import CheckpointMismatch
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs
from tencentpretrain.reliability.row import Row, Scale

_STEPS, _BEFORE = 6, 3
Harm = Callable[[Path], str]
"""Changes a checkpoint directory; returns the name that the refusal must have."""


@ROWS.register("R6")
def check_wrong_files(scale: Scale, folder: Path) -> Row:
    """Missing, extra and swapped files, files of another step and of another run, each in turn."""
    flags, alone = _two_checkpoints(folder)
    other = folder / "other"
    runs.train_alone(flags, other, "--seed", "11")
    newest = CheckpointFolder(runs.checkpoints_of(alone)).path(_STEPS)
    foreign = [CheckpointFolder(runs.checkpoints_of(alone)).path(_BEFORE),
               CheckpointFolder(runs.checkpoints_of(other)).path(_STEPS)]  # fmt: skip
    harms = list(_wrong_files(newest, foreign))
    held = 0
    wrong: list[str] = []
    for number, (name, harm) in enumerate(harms):
        harmed = folder / f"harmed-{number}"
        runs.copy_run(alone, harmed)
        checkpoints = CheckpointFolder(runs.checkpoints_of(harmed))
        expected = harm(checkpoints.path(_STEPS))
        said = _refusal(checkpoints.path(_STEPS))
        used = checkpoints.newest()
        aside = checkpoints.folder / "damaged" / checkpoints.path(_STEPS).name
        good = expected in said and used == checkpoints.path(_BEFORE) and aside.is_dir()
        held += good
        wrong += [] if good else [f"{name}: {said or 'not refused'}"]
        shutil.rmtree(f"{harmed}.run")
    whole = harms if scale == "full" else harms[:1]
    ended = 0
    for number, (_, harm) in enumerate(whole):
        harmed = folder / f"continued-{number}"
        runs.copy_run(alone, harmed)
        harm(CheckpointFolder(runs.checkpoints_of(harmed)).path(_STEPS))
        ended += runs.train(flags, harmed) == 0 and not runs.differences(alone, harmed, _STEPS)
    return Row(
        name="R6",
        promised="missing, extra, swapped file, file of another step or run: refused by name, older one used: 100 %",
        reached=f"{held}/{len(harms)} refused by name; {ended}/{len(whole)} runs went on to the same end"
        + "".join(f"; {text}" for text in wrong[:3]),
        passed=held == len(harms) and ended == len(whole),
    )


def _wrong_files(newest: Path, foreign: list[Path]) -> Iterator[tuple[str, Harm]]:
    names = sorted(file.name for file in newest.iterdir())

    def lose(name: str) -> Harm:
        def harm(path: Path) -> str:
            (path / name).unlink()
            return name

        return harm

    def add(name: str) -> Harm:
        def harm(path: Path) -> str:
            shutil.copy(path / names[-1], path / name)
            return name

        return harm

    def swap(first: str, second: str) -> Harm:
        def harm(path: Path) -> str:
            (path / first).rename(path / "between")
            (path / second).rename(path / first)
            (path / "between").rename(path / second)
            return ""  # either of the two

        return harm

    def take(name: str, source: Path) -> Harm:
        def harm(path: Path) -> str:
            shutil.copy(source / name, path / name)
            # A whole manifest of another step shows at its step or at the files that do not match it.
            return "" if name == "MANIFEST.json" else name

        return harm

    def rename(path: Path) -> str:
        shutil.rmtree(path)
        shutil.copytree(foreign[0], path)
        return path.name

    for name in names:
        yield f"{name} missing", lose(name)
        for source in foreign:
            if (source / name).read_bytes() != (newest / name).read_bytes():
                yield f"{name} of {source.parts[-3]} {source.name}", take(name, source)
    for extra in ("model-00007.safetensors", "optim-00001.safetensors", "notes.txt"):
        yield f"{extra} added", add(extra)
    for first, second in itertools.combinations(names, 2):
        yield f"{first} and {second} swapped", swap(first, second)
    yield "directory of another step under this name", rename


@ROWS.register("R7")
def check_all_damaged(scale: Scale, folder: Path) -> Row:
    """Every checkpoint of a run is damaged in the same way."""
    flags, alone = _two_checkpoints(folder)
    names = sorted(file.name for file in CheckpointFolder(runs.checkpoints_of(alone)).path(_STEPS).iterdir())

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-7])

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)

    ways: list[tuple[str, Callable[[Path], None]]] = [
        ("empty", lambda file: os.truncate(file, 0)),
        ("missing", Path.unlink),
        ("cut", cut),
        ("flipped", flip),
    ]
    cases = [(name, way) for name in names for way in ways] if scale == "full" else [(names[1], ways[0])]
    held = 0
    wrong: list[str] = []
    for number, (name, (word, harm)) in enumerate(cases):
        output = folder / f"all-{number}"
        runs.copy_run(alone, output)
        checkpoints = CheckpointFolder(runs.checkpoints_of(output))
        paths = [checkpoints.path(step) for step in checkpoints.steps()]
        for path in paths:
            harm(path / name)
        status = runs.train(flags, output)
        said = runs.log_of(output).read_text(encoding="utf-8")
        listed = all(any(path.name in line and name in line for line in said.splitlines()) for path in paths)
        good = (
            status == 4 and listed and all(path.is_dir() for path in paths) and not Path(f"{output}-{_STEPS}").exists()
        )
        held += good
        wrong += [] if good else [f"{name} {word}: exit code {status}"]
    return Row(
        name="R7",
        promised="every checkpoint damaged: exit code 4, each listed with its reason, no fresh start: 100 %",
        reached=f"{held}/{len(cases)} kinds of damage" + "".join(f"; {text}" for text in wrong[:3]),
        passed=held == len(cases),
    )


def _two_checkpoints(folder: Path) -> tuple[list[str], Path]:
    """Trains a run that leaves two checkpoints."""
    flags = [*runs.prepare("lm", folder, _STEPS, _BEFORE, lines=60), "--num_workers", "0"]
    runs.train_alone(flags, folder / "alone")
    return flags, folder / "alone"


def _refusal(path: Path) -> str:
    try:
        verify(path)
    except CheckpointMismatch as error:
        return str(error)
    return ""
