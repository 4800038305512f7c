"""Training runs of a tenth of a second, in forks of this process: what `pretrain` does from folder to checkpoints.

Trainer, engine, recorder, run folder and checkpoints are those of every run; only model and data are made up here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tencentpretrain.checkpoint.training import load
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.train import OptimConfig, PrecisionConfig, TrainConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.engines.processes import whole_world
from tencentpretrain.engines.replicas import ReplicaEngine
from tencentpretrain.errors import ResourceError, TencentPretrainError
from tencentpretrain.model import build_model
from tencentpretrain.optim.build import build_optimizer
from tencentpretrain.reliability import runs
from tencentpretrain.train.peers import Peers
from tencentpretrain.train.recorder import RunRecorder
from tencentpretrain.train.resume import restore_model
from tencentpretrain.train.run_folder import RunFolder, configure_logging
from tencentpretrain.train.signals import StopRequest
from tencentpretrain.train.trainer import Trainer

_VOCAB_SIZE = 31
_BATCH_SIZE, _LENGTH = 4, 8
_CONFIG = ModelConfig(
    emb_size=16, hidden_size=16, feed_forward_size=32, num_heads=2, num_layers=1, hidden_act="gelu", max_seq_length=8,
    dropout=0.1, embedding=("word", "pos"), encoder="transformer", mask="causal", target=("lm",), tie_weights=True,
)  # fmt: skip

Change = Callable[[], None]
"""Done in a process before its run begins."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run is made.

    Fields:
        steps, save_steps: its length and the distance of its checkpoints.
        keep: checkpoints that stay.
        async_save: whether they are written in the background.
        world_size: processes.
    """

    steps: int = 6
    save_steps: int = 2
    keep: int = 2
    async_save: bool = True
    world_size: int = 1


class _Batches:
    """An endless stream that is a function of its position."""

    def __init__(self, position: int, rank: int, world_size: int) -> None:
        self.position = position
        self.waiting_seconds = 0.0
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        while True:
            generator = torch.Generator().manual_seed(self.position + self._rank)
            token_ids = torch.randint(1, _VOCAB_SIZE, (_BATCH_SIZE, _LENGTH + 1), generator=generator)
            self.position += _BATCH_SIZE * self._world_size
            yield Batch(
                token_ids=token_ids[:, :-1],
                segment_ids=torch.ones(_BATCH_SIZE, _LENGTH, dtype=torch.long),
                labels={"lm": token_ids[:, 1:]},
            )


def train(
    output: Path, plan: Plan, rank: int = 0, saved_step: Callable[[RunRecorder, Trainer], None] | None = None
) -> None:
    """Trains to the last step, from the newest checkpoint if there is one; collective in its processes.

    Args:
        saved_step: called after each save has begun, with what was saved from.
    """
    precision = PrecisionConfig(device="cpu", threads=1)
    engine = LocalEngine(precision) if plan.world_size == 1 else ReplicaEngine(precision, whole_world())
    config = TrainConfig(
        output_model_path=str(output), total_steps=plan.steps, save_checkpoint_steps=plan.save_steps, report_steps=1
    )
    with contextlib.ExitStack() as stack:
        folder = RunFolder(str(output), plan.keep, rank=rank, world_size=plan.world_size)
        folder.checkpoints.retry_seconds = 0.01
        chosen: list[Any] = [None]
        if rank == 0:
            stack.enter_context(folder)
            configure_logging(folder.path / "log.txt", level="INFO", file_level="INFO")
            folder.checkpoints.tidy()
            chosen = [folder.checkpoints.newest()]
            Path(f"{output}.from").write_text(chosen[0].name if chosen[0] else "")
        if plan.world_size > 1:
            dist.broadcast_object_list(chosen)
        saved = load(chosen[0]) if chosen[0] else None
        if rank == 0:
            folder.metrics.rewind(saved.values["step"] if saved else 0)
        model = build_model(_CONFIG, _VOCAB_SIZE, seed=3)
        if saved:
            restore_model(model, saved, folder.path, engine.layout)
        optimizer = engine.prepare(model, lambda prepared: build_optimizer(prepared, OptimConfig(learning_rate=1e-2)))
        if saved:
            engine.restore_optimizer(optimizer, saved.optimizer)
        recorder = stack.enter_context(
            RunRecorder(
                folder,
                published=lambda name: True,
                model_format="bin",
                async_save=plan.async_save,
                identity={},
                peers=Peers(rank, plan.world_size),
            )
        )
        if saved_step is not None:
            _after_each_save(recorder, saved_step)
        trainer = Trainer(
            model,
            optimizer,
            engine,
            learning_rate=lambda updates: 1e-2,
            batches=_Batches(saved.values["position"] if saved else 0, rank, plan.world_size),
            config=config,
            recorder=recorder,
        )
        if saved:
            trainer.load_state(saved.values)
        if trainer.step < plan.steps:
            trainer.fit(StopRequest())
        recorder.finish()


def _after_each_save(recorder: RunRecorder, call: Callable[[RunRecorder, Trainer], None]) -> None:
    save = recorder.save

    def noted(trainer: Trainer, weights_names: Sequence[int]) -> None:
        save(trainer, weights_names)
        call(recorder, trainer)

    recorder.save = noted  # type: ignore[method-assign]


def start(output: Path, plan: Plan, changes: Mapping[int, Change] | None = None) -> list[int]:
    """Starts the processes of a run and returns their numbers; what they say is in `<output>.txt`."""
    runs.warm_up()
    meeting = Path(f"{output}.meeting")
    meeting.unlink(missing_ok=True)

    def begin(rank: int) -> runs.Command:
        def command(arguments: Sequence[str]) -> int:
            os.environ["RANK"] = str(rank)
            torch.set_num_threads(1)
            try:
                if plan.world_size > 1:
                    place = f"file://{meeting}"
                    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=plan.world_size)
                (changes or {}).get(rank, lambda: None)()
                train(output, plan, rank)
            except TencentPretrainError as error:
                print(f"error: {error}", flush=True)
                return error.exit_code
            except Exception:
                traceback.print_exc()
                return 1
            return 0

        return command

    return [runs.start(begin(rank), (), runs.log_of(output)) for rank in range(plan.world_size)]


def run(output: Path, plan: Plan, changes: Mapping[int, Change] | None = None, most: float = 120.0) -> list[int]:
    """Runs to the end and returns the exit codes by rank, or minus the signals.

    As with a launcher, the others are ended when one fails; those count with the code that it had.
    """
    processes = start(output, plan, changes)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + most
    while len(codes) < len(processes):
        for process in processes:
            ended, status = (0, 0) if process in codes else os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
        failed = [code for code in codes.values() if code]
        if failed or time.monotonic() > deadline:
            for process in processes:
                if process not in codes:
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                    codes[process] = failed[0] if failed else -signal.SIGKILL
        time.sleep(0.002)
    return [codes[process] for process in processes]


def run_alone(output: Path, plan: Plan) -> None:
    """Runs to a good end."""
    if any(run(output, plan)):
        raise ResourceError(f"the run left alone failed:\n{runs.log_of(output).read_text()}")


def remove(output: Path) -> None:
    """Removes all files of a run."""
    for path in output.parent.glob(f"{output.name}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
