"""Kills training runs at random moments, restarts them, and compares the end with a run that was left alone."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tencentpretrain.checkpoint.training import CheckpointFolder
from tencentpretrain.errors import ResourceError
from tencentpretrain.train.metrics import MetricsFile

_WORDS = 300
_SENTINELS = 40
_SEQ_LENGTH = 32
_SIZES: Mapping[str, Any] = {
    "emb_size": 32, "hidden_size": 32, "feedforward_size": 64, "heads_num": 2, "layers_num": 2, "hidden_act": "gelu",
    "max_seq_length": 64, "dropout": 0.1, "embedding": ["word", "pos"], "encoder": "transformer",
}  # fmt: skip
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "mlm": {"mask": "fully_visible", "target": ["mlm"], "tie_weights": True},
    "lm": {"mask": "causal", "target": ["lm"]},
    "t5": {
        "mask": "fully_visible", "target": ["lm"], "decoder": "transformer", "decoder_layers_num": 2,
        "tgt_embedding": ["word", "pos"], "share_embedding": True,
    },
}  # fmt: skip
"""Two-layer models by data processor."""


Command = Callable[[Sequence[str]], int]


@dataclass(frozen=True, kw_only=True)
class Commands:
    """The two commands under test: each takes its flags and returns its exit code."""

    preprocess: Command
    pretrain: Command


@dataclass(frozen=True, kw_only=True)
class Account:
    """What happened to one objective.

    Fields:
        kills: SIGKILLs that met a living run.
        kills_in_training: those aimed at the time after the first report; the others strike while a run starts.
        runs: runs that were brought to their end through kills.
        identical: how many of them ended in the bytes and metrics of the run left alone.
        lost_steps: most steps between the last report of a killed run and its newest checkpoint.
        differences: where a run ended otherwise.
    """

    objective: str
    kills: int
    kills_in_training: int
    runs: int
    identical: int
    lost_steps: int
    differences: tuple[str, ...]

    def __str__(self) -> str:
        text = (
            f"{self.objective}: {self.kills} kills ({self.kills_in_training} in training), {self.identical} of "
            f"{self.runs} interrupted runs ended in the same bytes and metrics, at most {self.lost_steps} steps lost"
        )
        return "\n  ".join([text, *self.differences])


def kill_and_compare(
    commands: Commands, objective: str, folder: Path, *, steps: int, save_steps: int, kills: int, seed: int = 0
) -> Account:
    """Trains once undisturbed, then again and again under SIGKILL until `kills` have struck.

    Args:
        commands: what is run.
        objective: a key of OBJECTIVES.
        folder: an empty folder for the data and all runs.
        steps, save_steps: length of a run and distance of its checkpoints.
        kills: how many.
        seed: of the moments.
    """
    importlib.import_module("torch._dynamo")  # optimizers import it at first use; forks should not each wait for that
    draw = random.Random(f"{objective}/{seed}")
    common = prepare(commands, objective, folder, steps, save_steps)
    began = time.monotonic()
    process = _start(
        commands.pretrain,
        [*common, "--output_model_path", str(folder / "alone"), "--num_workers", "0"],
        folder / "alone.txt",
    )
    ready = _seconds_to_first_report(folder / "alone", process, began)
    status = _wait(process)
    training = time.monotonic() - began - ready
    if status:
        raise ResourceError(f"the run left alone ended with exit code {status}:\n{(folder / 'alone.txt').read_text()}")
    struck = trained = runs = identical = lost = 0
    differences: list[str] = []
    while struck < kills:
        runs += 1
        output = folder / f"killed-{runs}"
        arguments = [*common, "--output_model_path", str(output)]
        while True:
            process = _start(commands.pretrain, arguments, folder / f"killed-{runs}.txt")
            # A fifth of the kills strike while the run starts, the others within the next four saves.
            starting = draw.random() < 0.2
            moment = draw.random() * (ready if starting else training * min(1.0, 4 * save_steps / steps))
            delay = None if struck == kills else moment if starting else ready + moment
            status = _wait(process, delay)
            if status != -signal.SIGKILL:
                break
            struck += 1
            trained += not starting
            lost = max(lost, _lost_steps(output))
        found = _differences(folder / "alone", output, steps)
        if status:
            found.append(f"exit code {status}")
        identical += not found
        differences += [f"run {runs}: {difference}" for difference in found]
    return Account(
        objective=objective,
        kills=struck,
        kills_in_training=trained,
        runs=runs,
        identical=identical,
        lost_steps=lost,
        differences=tuple(differences),
    )


def prepare(commands: Commands, objective: str, folder: Path, steps: int, save_steps: int) -> list[str]:
    """Writes a random corpus, its vocabulary, store and a config; returns the flags that all runs share."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = [f"word{number}" for number in range(_WORDS)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"<extra_id_{number}>" for number in range(_SENTINELS))]
    (folder / "vocab.txt").write_text("\n".join([*special, *words]) + "\n")
    lines = (" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(400))
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    (folder / "config.json").write_text(json.dumps({**_SIZES, **OBJECTIVES[objective]}))
    data = [
        "--dataset_path", str(folder / "store"), "--vocab_path", str(folder / "vocab.txt"),
        "--data_processor", objective, "--seq_length", str(_SEQ_LENGTH),
    ]  # fmt: skip
    log = folder / "preprocess.txt"
    if _wait(_start(commands.preprocess, ["--corpus_path", str(folder / "corpus.txt"), *data], log)):
        raise ResourceError(f"preprocessing failed:\n{log.read_text()}")
    return [
        *data, "--config_path", str(folder / "config.json"), "--total_steps", str(steps), "--batch_size", "4",
        "--save_checkpoint_steps", str(save_steps), "--report_steps", "3", "--learning_rate", "0.001",
        "--dev_dataset_path", str(_copied(folder / "store")), "--eval_batches", "2", "--device", "cpu",
        "--threads", "1", "--max_grad_norm", "1.0",
    ]  # fmt: skip


def _copied(store: Path) -> Path:
    copy = store.with_name("dev-store")
    shutil.copytree(store, copy)
    return copy


def _start(command: Command, arguments: Sequence[str], log: Path) -> int:
    """Runs a command in a child of this process, which has imported all it needs; returns its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = command(list(arguments))
    finally:
        os._exit(status)


def _seconds_to_first_report(output: Path, process: int, began: float) -> float:
    metrics = MetricsFile(Path(f"{output}.run") / "metrics.jsonl")
    while not metrics.records() and Path(f"/proc/{process}/exe").exists() and time.monotonic() - began < 300:
        time.sleep(0.02)
    return time.monotonic() - began


def _wait(process: int, kill_after: float | None = None) -> int:
    """Waits for a child, killing it after some seconds; returns its exit code, or minus the signal that ended it."""
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while deadline is not None and time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    if deadline is not None:
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _lost_steps(output: Path) -> int:
    run = output.with_name(f"{output.name}.run")
    records = MetricsFile(run / "metrics.jsonl").records()
    reached = max((record["step"] for record in records), default=0)
    return max(0, int(reached - max(CheckpointFolder(run / "checkpoints").steps(), default=0)))


def _differences(alone: Path, killed: Path, steps: int) -> list[str]:
    """Compares weights, optimizer and metrics of two finished runs byte for byte; times are left out."""
    found = []
    name = f"checkpoints/step-{steps:08d}"
    pairs = [(Path(f"{alone}-{steps}"), Path(f"{killed}-{steps}"))]
    pairs += [
        (Path(f"{alone}.run") / name / file, Path(f"{killed}.run") / name / file)
        for file in ("model.safetensors", "optim.safetensors")
    ]
    for ours, theirs in pairs:
        if not theirs.is_file() or ours.read_bytes() != theirs.read_bytes():
            found.append(f"{theirs} differs from {ours}")
    if _timeless_metrics(alone) != _timeless_metrics(killed):
        found.append(f"{killed}.run/metrics.jsonl differs")
    return found


def _timeless_metrics(output: Path) -> list[dict[str, Any]]:
    lines = Path(f"{output}.run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "timing"} for line in lines]
