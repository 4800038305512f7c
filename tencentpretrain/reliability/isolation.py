"""R20: checkpoints that are written while training changes what they were taken from."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from tencentpretrain import faults
from tencentpretrain.checkpoint.files import read_tensors
from tencentpretrain.checkpoint.training import CheckpointFolder, load
from tencentpretrain.optim.state import optimizer_tensors
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs, small_runs
from tencentpretrain.reliability.row import Row, Scale
from tencentpretrain.reliability.small_runs import Plan
from tencentpretrain.train.recorder import RunRecorder
from tencentpretrain.train.trainer import Trainer


@ROWS.register("R20")
def check_isolation(scale: Scale, folder: Path) -> Row:
    """Every save is held up until training has changed every weight; then it is compared with the step it claims."""
    saves = 100 if scale == "full" else 10
    found = runs.in_child(lambda: _compare(folder / "run", saves))
    return Row(
        name="R20",
        promised="saved tensors equal the step they claim while training goes on: 100/100",
        reached=f"{found['equal']}/{saves} saves equal their step in weights, optimizer and published weights, while "
        f"{found['moved']} of {saves - 1} were still being written after a later update",
        passed=found["equal"] == saves and found["moved"] > 0,
    )


def _compare(output: Path, saves: int) -> dict[str, int]:
    """Trains with a slow disk; returns how many checkpoints are those of their step, and how many were overtaken."""
    expected: dict[int, dict[str, Tensor]] = {}
    under_way: list[int] = []
    overtaken: set[int] = set()
    torch.set_num_threads(1)
    descriptor = os.open(f"{output}.txt", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(descriptor, 2)

    def slow(name: str, path: object = None) -> None:
        if name == "file.sync":
            time.sleep(0.005)

    def note(recorder: RunRecorder, trainer: Trainer) -> None:
        tensors = {**trainer.model.state_dict(), **optimizer_tensors(trainer.optimizer)}
        expected[trainer.step] = {name: tensor.clone() for name, tensor in tensors.items()}
        under_way.append(trainer.step)
        progress = recorder.progress

        def watch(step: int) -> None:
            if (
                under_way
                and step > under_way[-1]
                and not (runs.checkpoints_of(output) / f"step-{under_way[-1]:08d}").exists()
            ):
                overtaken.add(under_way[-1])
            progress(step)

        if len(under_way) == 1:
            recorder.progress = watch  # type: ignore[method-assign]

    faults.reach = slow
    small_runs.train(output, Plan(steps=2 * saves, save_steps=2, keep=0), saved_step=note)
    checkpoints, equal = CheckpointFolder(runs.checkpoints_of(output)), 0
    for step in checkpoints.steps():
        state = load(checkpoints.path(step))
        published = read_tensors(Path(f"{output}-{step}"))
        saved = {**state.model, **state.optimizer}
        same = set(saved) == set(expected[step]) and set(published) == set(state.model)
        same = same and all(torch.equal(saved[name], tensor) for name, tensor in expected[step].items())
        equal += same and all(torch.equal(published[name], state.model[name]) for name in published)
    return {"equal": equal, "moved": len(overtaken)}
