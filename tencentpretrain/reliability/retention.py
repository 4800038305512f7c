"""R10, R18: what earlier ends have left, and which checkpoints stay."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path

from tencentpretrain.checkpoint.manifest import verify
from tencentpretrain.checkpoint.training import CheckpointFolder, TrainingState
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs, small_runs
from tencentpretrain.reliability.boundaries import newest_whole
from tencentpretrain.reliability.row import Row, Scale
from tencentpretrain.reliability.small_runs import Plan


@ROWS.register("R10")
def check_leftovers(scale: Scale, folder: Path) -> Row:
    """Rests of every kind at the step that is saved next, for one and two processes."""
    wrong, held, total = [], 0, 0
    kinds = ("half", "foreign part", "several", "old lock", "weights", "retired")
    for world_size in (1, 2):
        plan = Plan(steps=4, world_size=world_size)
        alone = folder / f"alone-{world_size}"
        small_runs.run_alone(alone, plan)
        for kind in kinds[:2] if scale == "ci" and world_size > 1 else kinds:
            total += 1
            output = folder / f"{world_size}-{kind.replace(' ', '-')}"
            small_runs.run_alone(output, Plan(steps=2, world_size=world_size))
            _plant(kind, output, alone)
            codes = small_runs.run(output, plan, most=60.0)
            problems = [f"exit codes {codes}"] if any(codes) else runs.differences(alone, output, plan.steps)
            checkpoints = runs.checkpoints_of(output)
            problems += [f"{rest.name} is still there" for rest in checkpoints.glob(".unfinished-*")]
            if kind in ("half", "several", "foreign part") and len(list((checkpoints / "aside").iterdir())) != 1:
                problems.append("the newest rest was not kept aside")
            held += not problems
            wrong += [f"{world_size} ranks, {kind}: {problem}" for problem in problems]
    return Row(
        name="R10",
        promised="leftovers of a crash at the same step are moved aside, saving succeeds, no hang, all ranks agree: "
        "100 %",
        reached=f"{held}/{total} kinds and process counts" + "".join(f"; {text}" for text in wrong[:3]),
        passed=held == total,
    )


def _plant(kind: str, output: Path, alone: Path) -> None:
    """Leaves what a process may leave that was saving step 4 when it ended."""
    checkpoints, whole = runs.checkpoints_of(output), runs.checkpoints_of(alone) / "step-00000004"
    place = checkpoints / ".unfinished-step-00000004-1"
    if kind == "half":
        shutil.copytree(whole, place)
        (place / "MANIFEST.json").unlink()
    elif kind == "several":
        for number in (1, 2, 12345):
            (checkpoints / f".unfinished-step-00000004-{number}").mkdir()
            (checkpoints / f".unfinished-step-00000004-{number}" / "model-00000.safetensors").write_bytes(b"half")
        (checkpoints / ".latest.part").write_bytes(b"step")
    elif kind == "foreign part":
        place.mkdir()
        for rank in (0, 1):
            (place / f".part-{rank:05d}.json").write_text('{"rank": 1, "error": "of an earlier run"}')
        (place / ".stopped.json").write_text('{"rank": 0, "error": "of an earlier run"}')
    elif kind == "old lock":
        Path(f"{output}.run/lock").write_text('{"host": "elsewhere", "pid": 1, "start": "long ago"}')
    elif kind == "weights":
        output.with_name(f".{output.name}-4.part").write_bytes(b"half")
        output.with_name(f"{output.name}-4").write_bytes(b"half")
    else:
        shutil.copytree(whole, checkpoints / ".unfinished-step-00000001-retired")
        (checkpoints / ".unfinished-step-00000001-retired" / "MANIFEST.json").unlink()


@ROWS.register("R18")
def check_retention(scale: Scale, folder: Path) -> Row:
    """Random histories of saving, damage, crashes of deletion and new starts with other limits."""
    count = 1000 if scale == "full" else 25
    checkpoints = logging.getLogger("tencentpretrain.checkpoint")
    level = checkpoints.level
    checkpoints.setLevel(logging.ERROR)  # it warns of every damaged checkpoint
    try:
        wrong = [problem for number in range(count) if (problem := _history(number, folder / str(number)))]
    finally:
        checkpoints.setLevel(level)
    return Row(
        name="R18",
        promised="1,000 random histories: the newest whole checkpoint is never deleted, numeric order, count right",
        reached=f"{count - len(wrong)}/{count} histories" + "".join(f"; {text}" for text in wrong[:3]),
        passed=not wrong,
    )


def _history(number: int, folder: Path) -> str:
    """Plays a history and returns what went wrong in it."""
    draw = random.Random(number)
    output = folder / "model"
    place = runs.checkpoints_of(output)
    step, whole = 0, set[int]()
    for _ in range(draw.randint(1, 4)):
        keep = draw.randrange(5)
        checkpoints = CheckpointFolder(place, keep)
        checkpoints.tidy()
        if whole:
            found = checkpoints.newest()
            if found != checkpoints.path(max(whole)):
                return f"history {number}: {found} taken, not step {max(whole)}"
            whole = set(checkpoints.steps())
            step = max(whole)
        for _ in range(draw.randint(1, 5)):
            step += draw.choice((1, 9, 90, 99_999_999))
            checkpoints.save(step, TrainingState(model={}, optimizer={}, values={"seed": number}))
            whole.add(step)
            whole = set(sorted(whole)[-keep:]) if keep else whole
            if checkpoints.steps() != sorted(whole):
                return f"history {number}, keep {keep}: {checkpoints.steps()} stay, not {sorted(whole)}"
            verify(checkpoints.path(step))
        if newest_whole(output) != checkpoints.path(step).name:
            return f"history {number}: step {step} is not the newest whole one"
        if len(whole) > 1 and draw.random() < 0.5:  # the newest is damaged before the next start
            (checkpoints.path(step) / "state.json").write_bytes(b"{}")
            whole.remove(step)
        elif draw.random() < 0.3:  # a crash while an old one was deleted
            rest = place / ".unfinished-step-00000000-retired"
            shutil.copytree(checkpoints.path(step), rest)
            (rest / "MANIFEST.json").unlink()
    return ""
