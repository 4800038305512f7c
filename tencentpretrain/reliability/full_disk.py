"""R8, R9: disks that are full or failing, at every place where something is written."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from tencentpretrain import faults
from tencentpretrain.checkpoint.manifest import verify
from tencentpretrain.checkpoint.training import CheckpointFolder, Publication, TrainingState, load
from tencentpretrain.errors import CheckpointMismatch, ResourceError
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs, small_runs
from tencentpretrain.reliability.row import Row, Scale
from tencentpretrain.reliability.small_runs import Plan

_PLAN = Plan(steps=4, save_steps=2, keep=1)
_NEEDS_NO_SPACE = ("unlink", "remove", "discard", "clear", "retire")
_SENTENCE = re.compile(r"/\S+: .*?[\d,]+ (more )?bytes are needed, [\d,]+ are free")


def _reached(trace: Callable[[Path], object], folder: Path) -> list[tuple[str, int, str]]:
    """Returns every point of a piece of work with its occurrence and its file."""
    path = folder / "points"
    trace(path)
    counts: Counter[str] = Counter()
    found = []
    for line in path.read_text().splitlines():
        point, _, file = line.partition("\t")
        counts[point] += 1
        found.append((point, counts[point], file))
    return found


def _sample(points: Iterable[tuple[str, int, str]], scale: Scale, part: int) -> list[tuple[str, int, str]]:
    """Returns all points, or the last of every kind and of these every `part`-th."""
    points = list(points)
    if scale == "full":
        return points
    return list({(point, file.strip(".0123456789-")): (point, count, file) for point, count, file in points}.values())[
        ::part
    ]


def _needs_space(point: str) -> bool:
    return not point.rpartition(".")[2].startswith(_NEEDS_NO_SPACE)


@ROWS.register("R8")
def check_full_disk(scale: Scale, folder: Path) -> Row:
    """A full disk at every write of training and of preprocessing; then a start with room; and the predicted size."""
    training, wrong = _training_points(folder), list[str]()
    points = _sample([point for point in training if _needs_space(point[0])], scale, 6)
    for number, (point, occurrence, file) in enumerate(points):
        problems = _survive(folder / "alone", folder / f"full-{number}", f"{point}:{occurrence}:ENOSPC", {5})
        wrong += [f"{point}:{occurrence} ({file}): {problem}" for problem in problems[:1]]
    stores, said = _preprocessing(scale, folder / "preprocessing")
    wrong += said
    off = max(_misprediction(folder / "alone", small=True), _misprediction(folder / "alone", small=False))
    total = len(points) + stores
    return Row(
        name="R8",
        promised="a full disk at each write of save, metrics, log, preprocessing: exit 5 with path, needed and free "
        "bytes, earlier checkpoints whole, nothing half published, goes on with room: 100 %; predicted size within 5 %",
        reached=f"{total - len(wrong)}/{total} points ({len(points)} of training, {stores} of preprocessing); "
        f"predicted size at most {off:.1%} off" + "".join(f"; {text}" for text in wrong[:3]),
        passed=not wrong and off <= 0.05,
    )


def _training_points(folder: Path) -> list[tuple[str, int, str]]:
    """Returns the points of a run that keeps one checkpoint; the run to compare with is `alone`."""
    small_runs.run_alone(folder / "alone", Plan(steps=4, save_steps=2, keep=0))
    output = folder / "traced"
    points = _reached(lambda path: small_runs.run(output, _PLAN, {0: lambda: faults.trace(path)}), folder)
    small_runs.remove(output)
    return points


def _survive(alone: Path, output: Path, switch: str, codes: set[int]) -> list[str]:
    """Lets a run meet a fault, looks at what it says and leaves, and starts it again."""
    code = small_runs.run(output, _PLAN, {0: lambda: faults.arm(switch)})[0]
    said = runs.log_of(output).read_text()
    wrong = [] if code in codes else [f"exit code {code}: {said[-300:]}"]
    if code == 5 and switch.endswith("ENOSPC") and not _SENTENCE.search(said):
        wrong.append(f"the message lacks path, needed or free bytes: {said[-300:]}")
    checkpoints = CheckpointFolder(runs.checkpoints_of(output))
    for step in checkpoints.steps():
        try:
            verify(checkpoints.path(step))
        except CheckpointMismatch as error:
            wrong.append(f"half published: {error}")
    for weights in output.parent.glob(f"{output.name}-*"):
        if weights.read_bytes() != Path(f"{alone}{weights.name.removeprefix(output.name)}").read_bytes():
            wrong.append(f"half published: {weights.name}")
    if code == 5:
        again = small_runs.run(output, _PLAN)
        if any(again):
            return [*wrong, f"the next start ended with {again}: {runs.log_of(output).read_text()[-300:]}"]
    wrong += runs.differences(alone, output, _PLAN.steps)
    if not wrong:
        small_runs.remove(output)
    return wrong


def _preprocessing(scale: Scale, folder: Path) -> tuple[int, list[str]]:
    """Fills the disk at every write of a build; returns how many there were and what went wrong."""
    runs.warm_up()
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]) + "\n")
    (folder / "corpus.txt").write_text("a b a\nb b\n\na a a b\n" * 5 + "a\0b\n")

    def build(name: str, change: Callable[[], None]) -> int:
        flags = ["--corpus_path", str(folder / "corpus.txt"), "--vocab_path", str(folder / "vocab.txt")]
        flags += ["--dataset_path", str(folder / name), "--data_processor", "lm", "--seq_length", "8"]

        def command(arguments: list[str]) -> int:
            change()
            return runs.command("preprocess")(arguments)

        return runs.run(command, [*flags, "--processes_num", "1", "--max_rejected", "1"], folder / f"{name}.txt")  # type: ignore[arg-type]

    if build("alone", lambda: None):
        raise ResourceError((folder / "alone.txt").read_text())
    alone = _digest(folder / "alone")
    points = _reached(lambda path: build("traced", lambda: faults.trace(path)), folder)
    points = _sample([point for point in points if _needs_space(point[0])], scale, 8)
    wrong = []
    for number, (point, occurrence, file) in enumerate(points):
        name = f"full-{number}"
        where = f"{point}:{occurrence}:ENOSPC"
        code = build(name, lambda where=where: faults.arm(where))  # type: ignore[misc]
        said = (folder / f"{name}.txt").read_text()
        if code != 5 or not _SENTENCE.search(said):
            wrong.append(f"preprocessing, {point}:{occurrence} ({file}): exit code {code}: {said[-300:]}")
        if (folder / name).exists() and _digest(folder / name) != alone:
            wrong.append(f"preprocessing, {point}:{occurrence} ({file}): half published")
        if build(name, lambda: None) or _digest(folder / name) != alone:
            wrong.append(f"preprocessing, {point}:{occurrence} ({file}): the next start does not end the same")
    shutil.rmtree(folder, ignore_errors=True)
    return len(points), wrong


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _misprediction(alone: Path, *, small: bool) -> float:
    """Returns by what share the predicted size of a save is off, for the run's own model or a larger one."""
    place = alone.with_name(f"sizes-{small}")
    newest = CheckpointFolder(runs.checkpoints_of(alone)).path(_PLAN.steps)
    state = load(newest)
    values = {name: value for name, value in state.values.items() if name not in ("format", "step", "parts")}
    model = dict(state.model) if small else {f"layer.{number}.weight": torch.rand(256, 256) for number in range(30)}
    moments = {f"{name}/{what}": tensor.clone() for name, tensor in model.items() for what in ("exp_avg", "exp_avg_sq")}
    whole = TrainingState(model=model, optimizer=moments, values=values)
    publication = Publication(paths=[place / "model-4"], order=list(model))
    checkpoints = CheckpointFolder(place / "checkpoints")
    predicted = checkpoints.predicted_size(whole, publication)
    path = checkpoints.save(_PLAN.steps, whole, publication)
    written = sum(file.stat().st_size for file in [*path.iterdir(), *publication.paths])
    return abs(predicted - written) / written


@ROWS.register("R9")
def check_failing_disk(scale: Scale, folder: Path) -> Row:
    """Input/output errors that pass and that stay, stale handles, and a directory that may not be written."""
    training, wrong = _training_points(folder), list[str]()
    saving = [point for point in training if not point[0].startswith(("metrics.", "log.", "lock."))]
    begin = next(number for number, point in enumerate(saving) if point[0] == "directory.make")
    passing = _sample(saving[begin:], scale, 8)
    for number, (point, occurrence, file) in enumerate(passing):
        problems = _survive(folder / "alone", folder / f"passing-{number}", f"{point}:{occurrence}:EIO", {0})
        wrong += [f"passing EIO at {point}:{occurrence} ({file}): {problem}" for problem in problems[:1]]
    reports = _sample([point for point in training if point[0].startswith(("metrics.", "log.", "lock.o"))], scale, 3)
    for number, (point, occurrence, file) in enumerate(reports):
        problems = _survive(folder / "alone", folder / f"report-{number}", f"{point}:{occurrence}:EIO", {5})
        wrong += [f"EIO at {point}:{occurrence} ({file}): {problem}" for problem in problems[:1]]
    lasting = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EROFS)
    for code in lasting:
        wrong += [f"lasting {errno.errorcode[code]}: {text}" for text in _lasting(folder, code)[:1]]
    total = len(passing) + len(reports) + len(lasting)
    return Row(
        name="R9",
        promised="EIO, stale handle, read-only or forbidden directory: earlier checkpoints whole, exit 5, at most 3 "
        "retries, logged; passing errors are outlived: 100 %",
        reached=f"{total - len(wrong)}/{total} ({len(passing)} passing errors of saving, {len(reports)} of reports, "
        f"{len(lasting)} lasting)" + "".join(f"; {text}" for text in wrong[:3]),
        passed=not wrong,
    )


def _lasting(folder: Path, code: int) -> list[str]:
    """Lets the directory of checkpoints fail for good after the first save."""
    output = folder / f"lasting-{code}"

    def harm() -> None:
        reach = faults.reach

        def fail(name: str, path: object = None) -> None:
            if name == "directory.make" and "step-00000004" in str(path):
                raise OSError(code, os.strerror(code), str(path))
            reach(name)

        faults.reach = fail

    ended = small_runs.run(output, _PLAN, {0: harm})[0]
    said = runs.log_of(output).read_text()
    retries = 3 if code in (errno.EIO, errno.ESTALE) else 0
    wrong = [] if ended == 5 and "cannot be written" in said else [f"exit code {ended}: {said[-300:]}"]
    if said.count("writing it again") != retries:
        wrong.append(f"{said.count('writing it again')} retries were logged, not {retries}")
    if CheckpointFolder(runs.checkpoints_of(output)).steps() != [2]:
        wrong.append("the earlier checkpoint is not what is left")
    again = small_runs.run(output, _PLAN)
    if any(again):
        wrong.append(f"the next start ended with {again}")
    return wrong + runs.differences(folder / "alone", output, _PLAN.steps)
