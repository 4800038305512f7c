"""R2: crashes at every place where saving, publishing and deleting checkpoints reach the disk."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tencentpretrain import faults
from tencentpretrain.checkpoint.manifest import verify
from tencentpretrain.checkpoint.training import CheckpointFolder
from tencentpretrain.errors import CheckpointMismatch
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs, small_runs
from tencentpretrain.reliability.row import Row, Scale
from tencentpretrain.reliability.small_runs import Plan

_OF_SAVING = ("directory.", "file.", "folder.", "part.", "aside.", "metrics.sync")


@dataclass(frozen=True, kw_only=True)
class Crash:
    """Where a process is killed.

    Fields:
        rank: of the process.
        point, occurrence: the place.
        file: what is about to change there.
    """

    rank: int
    point: str
    occurrence: int
    file: str

    def __str__(self) -> str:
        return f"rank {self.rank} at {self.point}:{self.occurrence} ({self.file})"


def enumerate_crashes(plan: Plan, folder: Path) -> list[Crash]:
    """Returns every point of saving that a run reaches, of all its processes."""
    traces = {rank: folder / f"points-{rank}" for rank in range(plan.world_size)}
    output = folder / "traced"
    codes = small_runs.run(
        output,
        plan,
        {rank: (lambda path=path: faults.trace(path)) for rank, path in traces.items()},  # type: ignore[misc]
    )
    assert not any(codes), runs.log_of(output).read_text()
    small_runs.remove(output)
    crashes = []
    for rank, path in traces.items():
        counts: Counter[str] = Counter()
        saving = False
        for line in path.read_text().splitlines():
            point, _, file = line.partition("\t")
            counts[point] += 1
            saving = saving or point == "directory.make"  # what comes before belongs to the start of the run
            if saving and point.startswith(_OF_SAVING):
                crashes.append(Crash(rank=rank, point=point, occurrence=counts[point], file=file))
        path.unlink()
    return crashes


def survive(crash: Crash, plan: Plan, alone: Path, output: Path, action: str = "kill") -> list[str]:
    """Kills a run, starts it again, and returns what is wrong with its end."""
    switch = f"{crash.point}:{crash.occurrence}:{action}"
    codes = small_runs.run(output, plan, {crash.rank: lambda: faults.arm(switch)})
    wrong = [] if codes[crash.rank] == -signal.SIGKILL else [f"was not killed, but ended with {codes}"]
    wrong += _half_published(alone, output)
    expected = newest_whole(output)
    again = small_runs.run(output, plan)
    if any(again):
        wrong.append(f"the next start ended with {again}")
    else:
        found = Path(f"{output}.from").read_text()
        if found != expected:
            wrong.append(f"the next start took {found or 'nothing'}, not {expected or 'nothing'}")
        wrong += runs.differences(alone, output, plan.steps)
    if not wrong:
        small_runs.remove(output)
    return [f"{crash}: {text}" for text in wrong]


def newest_whole(output: Path) -> str:
    """Returns the name of the newest checkpoint that is whole."""
    checkpoints = CheckpointFolder(runs.checkpoints_of(output))
    for step in reversed(checkpoints.steps()):
        try:
            verify(checkpoints.path(step))
        except CheckpointMismatch:
            continue
        return checkpoints.path(step).name
    return ""


def _half_published(alone: Path, output: Path) -> Iterator[str]:
    """Yields checkpoints and weights that have their name but are not whole."""
    checkpoints = CheckpointFolder(runs.checkpoints_of(output))
    for step in checkpoints.steps():
        try:
            verify(checkpoints.path(step))
        except CheckpointMismatch as error:
            yield f"half published: {error}"
    for weights in output.parent.glob(f"{output.name}-*"):
        if weights.read_bytes() != Path(str(alone) + weights.name.removeprefix(output.name)).read_bytes():
            yield f"half published: {weights}"


def _sample(crashes: list[Crash]) -> list[Crash]:
    """Returns the last crash of each kind: of a point and what it changes."""
    kinds = {(crash.rank, crash.point, crash.file.strip(".0123456789-")): crash for crash in crashes}
    return list(kinds.values())


def survey(plan: Plan, scale: Scale, folder: Path) -> tuple[int, list[str]]:
    """Crashes a plan at its points, all or a sample; returns how many there were and what went wrong."""
    folder.mkdir()
    alone = folder / "alone"
    small_runs.run_alone(alone, replace(plan, keep=0))
    crashes = enumerate_crashes(plan, folder)
    if scale == "ci":
        crashes = _sample(crashes)[plan.async_save :: 6 if plan.world_size == 1 else 24]
    wrong = []
    for number, crash in enumerate(crashes):
        action = "short" if faults.POINTS[crash.point].content and number % 2 else "kill"
        wrong += survive(crash, plan, alone, folder / f"crashed-{number}", action)[:1]
    return len(crashes), wrong


@ROWS.register("R2")
def check_boundaries(scale: Scale, folder: Path) -> Row:
    """One and two processes, saving in the step and in the background, a kill at every point, then a new start."""
    counts, wrong = [], []
    for world_size in (1, 2):
        for async_save in (True,) if scale == "ci" and world_size > 1 else (False, True):
            plan = Plan(world_size=world_size, async_save=async_save)
            count, problems = survey(plan, scale, folder / f"{world_size}-{async_save}")
            counts.append((count, f"{count} with {world_size} ranks, {'async' if async_save else 'sync'}"))
            wrong += problems
    total = sum(count for count, _ in counts)
    return Row(
        name="R2",
        promised="a crash at each write boundary of save, publish, prune: the last complete checkpoint is used, the "
        "run ends identical; sync and async, 1 and 2 ranks: 100 %",
        reached=f"{total - len(wrong)}/{total} points ({'; '.join(text for _, text in counts)})"
        + "".join(f"; {text}" for text in wrong[:3]),
        passed=not wrong,
    )
