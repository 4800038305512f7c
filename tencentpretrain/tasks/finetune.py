"""Fine-tuning: epochs over a table, the best epoch on the dev table kept.

The schedule's length is floor(rows * epochs / batch_size) + 1 updates and advances once per batch, as published.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tencentpretrain.checkpoint.files import write_tensors
from tencentpretrain.checkpoint.loading import load_checkpoint
from tencentpretrain.config.base import Section
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.train import OptimConfig, PrecisionConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.data.durable import storage_errors, to_json, write_durably
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.engines.select import open_replicas
from tencentpretrain.errors import NonFiniteError
from tencentpretrain.methods.adversarial import AdversarialMethod, FastGradient, ProjectedGradient
from tencentpretrain.optim.build import build_optimizer, build_schedule, set_learning_rate
from tencentpretrain.tasks.base import Evaluation, Task
from tencentpretrain.tasks.config import AdversarialConfig, FinetuneConfig
from tencentpretrain.tasks.examples import Examples, Indices, bucketed_batches, shuffled_batches
from tencentpretrain.tasks.heads import TaskModel
from tencentpretrain.tasks.predict import batch_width, build_task_model, predict_logits, refuse, refuse_non_finite
from tencentpretrain.tasks.tsv import Table, read_table
from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer
from tencentpretrain.tokenizers.base import Tokenizer
from tencentpretrain.train.agreement import facts
from tencentpretrain.train.peers import Peers
from tencentpretrain.train.run_folder import RunFolder, configure_logging
from tencentpretrain.train.trainer import step_seed

UNDECAYED_NAMES = ("bias", "gamma", "beta")
"""The list of published fine-tuning scripts, for `decay_groups` "name"."""

UNUSED_PARTS = ("target.", "decoder.", "tgt_embedding.")
"""Tensors of pre-trained files that a task without them does not need."""

log = logging.getLogger("tencentpretrain")

Sections = Mapping[type[Section], Any]


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a run reached.

    Fields:
        best_epoch: counted from 1.
        dev, test: measures of the best model; test only where there is a test table.
    """

    best_epoch: int
    dev: Evaluation
    test: Evaluation | None = None


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The tables of a run, tokenised once."""

    train: Examples
    dev: Examples
    test: Examples | None = None


def finetune(
    task_type: type[Task], sections: Sections, settings: Mapping[str, object], command: Sequence[str] = ()
) -> FinetuneResult:
    """Runs a whole fine-tuning.

    Args:
        sections: values of `FinetuneConfig`, `ModelConfig`, `TokenizerConfig`, `OptimConfig`, `PrecisionConfig` and of
            the task's own sections.
        settings: all settings in published spelling, noted in the run folder.
        command: the command line, noted there too.

    Raises:
        DataFormatError, ConfigError, CheckpointMismatch: something given is not usable; nothing was trained.
        NonFiniteError: the loss became NaN or infinite.
        ResourceError: the disk is full, or another run uses the same output path.
    """
    run: FinetuneConfig = sections[FinetuneConfig]
    config: ModelConfig = sections[ModelConfig]
    refuse(task_type.problems(config, run.seq_length))
    train, dev, test = read_tables(task_type, sections)
    task = task_type.for_training(sections, train)
    tokenizer = build_tokenizer(sections[TokenizerConfig])
    data = TaskData(
        train=task.examples(train, tokenizer, run.seq_length, labelled=True, training=True),
        dev=task.examples(dev, tokenizer, run.seq_length, labelled=True),
        test=task.examples(test, tokenizer, run.seq_length, labelled=True) if test is not None else None,
    )
    with (
        open_replicas(sections[PrecisionConfig]) as engine,
        Peers(engine.rank, engine.world_size) as peers,
        contextlib.ExitStack() as stack,
    ):
        refuse(_process_problems(task, engine))
        peers.agree(facts(dict(settings), {"tokenizer": tokenizer.fingerprint}, engine.world_size))
        folder = RunFolder(run.output_model_path, rank=engine.rank, world_size=engine.world_size)
        peers.of_leader("run folder", lambda: stack.enter_context(folder) and None)
        configure_logging(
            folder.path / (f"log-rank-{engine.rank:04d}.txt" if engine.rank else "log.txt"),
            level=run.log_level,
            file_level=run.log_file_level,
            extra_path=run.log_path if peers.leads else None,
            rank=engine.rank,
        )
        torch.manual_seed(step_seed(run.seed, 0, engine.rank) if engine.rank else run.seed)
        model = build_task_model(task, config, tokenizer, seed=run.seed)
        model.set_gradient_checkpointing(sections[PrecisionConfig].gradient_checkpointing)
        load_initial(model, task, run)
        if peers.leads:
            folder.start_anew()
            folder.describe(settings, list(command))
            note(folder, "task.json", {**task.describe(), "columns": train.columns})
            note(folder, "tokenizer.json", describe_tokenizer(tokenizer, sections[TokenizerConfig]))
        return Finetuner(task, model, data, tokenizer, sections, engine, folder, peers).run()


def _process_problems(task: Task, engine: LocalEngine) -> Iterator[str]:
    if engine.data_size > 1 and build_adversary(task.adversarial) is not None:
        yield "use_adv: disturbs the embedding by the gradient of a whole batch; train it in one process"


def note(folder: RunFolder, name: str, content: Mapping[str, object]) -> None:
    """Writes one JSON file into the run folder."""
    with storage_errors(folder.path, 4096):
        write_durably(folder.path / name, to_json(dict(content)))


def read_tables(task_type: type[Task], sections: Sections) -> tuple[Table, Table, Table | None]:
    """Reads all tables of a run, so that a fault in any of them is found before anything heavy."""
    run: FinetuneConfig = sections[FinetuneConfig]
    train = read_table(run.train_path, required=task_type.training_columns(sections))
    dev = read_table(run.dev_path, required=task_type.labelled_columns)
    test = read_table(run.test_path, required=task_type.labelled_columns) if run.test_path else None
    for table in (dev, test):
        if table is not None:
            task_type.check_same_input(train.columns, table)
    return train, dev, test


def load_initial(model: TaskModel, task: Task, run: FinetuneConfig) -> None:
    """Loads pre-trained weights below the head, if any were given, and reports what was loaded."""
    if run.pretrained_model_path is None:
        log.info("no --pretrained_model_path: training starts from random weights")
        return
    report = load_checkpoint(
        model,
        run.pretrained_model_path,
        strict=run.strict_loading,
        allow_missing=(*task.head_prefixes, *run.allow_missing),
        ignore_unexpected=UNUSED_PARTS,
        resize_vocab=run.resize_vocab,
    )
    log.info(report.text())


def describe_tokenizer(tokenizer: Tokenizer, config: TokenizerConfig) -> dict[str, object]:
    """Returns what identifies a tokenizer: its settings, size and fingerprint."""
    return {**config.model_dump(), "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}


def build_adversary(config: AdversarialConfig | None) -> AdversarialMethod | None:
    """Returns the adversarial method that the settings ask for."""
    if config is None or not config.use_adv:
        return None
    if config.adv_type == "fgm":
        return FastGradient(epsilon=config.fgm_epsilon)
    return ProjectedGradient(steps=config.pgd_k, epsilon=config.pgd_epsilon, alpha=config.pgd_alpha)


class Finetuner:
    """The loop."""

    def __init__(
        self,
        task: Task,
        model: TaskModel,
        data: TaskData,
        tokenizer: Tokenizer,
        sections: Sections,
        engine: LocalEngine,
        folder: RunFolder,
        peers: Peers,
    ) -> None:
        self.settings: FinetuneConfig = sections[FinetuneConfig]
        optim: OptimConfig = sections[OptimConfig]
        self.task = task
        self.model = model
        self.data = data
        self.pad_id = tokenizer.pad_id
        self.width = batch_width(sections[ModelConfig], self.settings.seq_length)
        self.engine = engine
        self.folder = folder
        self.peers = peers
        self.adversary = build_adversary(task.adversarial)
        self.max_grad_norm = optim.max_grad_norm
        self.optimizer = engine.prepare(model, lambda placed: build_optimizer(placed, optim, UNDECAYED_NAMES))
        total = math.floor(len(data.train) * self.settings.epochs_num / self.settings.batch_size) + 1
        self.learning_rate = build_schedule(optim, total)
        self.updates = 0
        self.started = time.monotonic()

    def run(self) -> FinetuneResult:
        """Trains all epochs, keeps the best model and measures it on the test table."""
        best, best_epoch, best_value = None, 0, -math.inf
        for epoch in range(1, self.settings.epochs_num + 1):
            self.train_epoch(epoch)
            found = self.evaluate(self.data.dev, "dev")
            value = found.metrics[self.task.best_metric]
            better = best is None or value > best_value
            log.info("Epoch id: %d, dev:\n%s", epoch, found.text)
            self.record(epoch=epoch, better=better, **_prefixed("dev", found))
            if better:
                best, best_epoch, best_value = found, epoch, value
                self.save()
            elif self.settings.early_stopping and epoch - best_epoch >= self.settings.early_stopping:
                log.info("no better dev result for %d epochs: training stops", epoch - best_epoch)
                break
        assert best is not None
        log.info("best epoch: %d, saved to %s", best_epoch, self.settings.output_model_path)
        return FinetuneResult(best_epoch=best_epoch, dev=best, test=self.test())

    def train_epoch(self, epoch: int) -> None:
        """Makes one update per batch of a new order."""
        self.model.train()
        mine = slice(self.engine.data_rank, None, self.engine.data_size)
        window: list[torch.Tensor] = []
        for index, rows in enumerate(self.batches(epoch), start=1):
            window.append(self.update(self.batch(rows[mine])))
            self.peers.progress(self.updates)
            if index % self.settings.report_steps == 0:
                mean = self.engine.sum_over_ranks({"loss": float(torch.stack(window).mean())})["loss"]
                window.clear()
                log.info("Epoch id: %d, Training steps: %d, Avg loss: %.3f", epoch, index, mean)
                self.record(epoch=epoch, loss=mean, lr=self.learning_rate(self.updates - 1))

    def batches(self, epoch: int) -> Iterator[Indices]:
        """Yields the rows of each batch of an epoch."""
        size, seed = self.settings.batch_size, self.settings.seed
        if self.settings.bucket_by_length:
            return bucketed_batches(self.data.train.lengths, size, seed=seed, epoch=epoch)
        return shuffled_batches(len(self.data.train), size, seed=seed, epoch=epoch)

    def batch(self, rows: Indices) -> Batch | None:
        """Returns this process's rows of a batch on the device; None if there are none, as in the last batch."""
        if not len(rows):
            return None
        return self.data.train.batch(rows, pad_id=self.pad_id, width=self.width).to(self.engine.device)

    def update(self, batch: Batch | None) -> torch.Tensor:
        """Makes one update and returns this process's share of the mean loss before it, detached.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; the weights are untouched.
        """
        loss = self.backward(batch)
        if self.adversary is not None:
            self.adversary.add_gradients(self.model, lambda: self.backward(batch))
        set_learning_rate(self.optimizer, self.learning_rate(self.updates))
        try:
            self.engine.update(self.optimizer, (), max_norm=self.max_grad_norm)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"update {self.updates + 1}: {error} (loss {float(loss)}); the update was not made. "
                "Lower --learning_rate, raise --warmup or give --max_grad_norm 1"
            ) from error
        self.updates += 1
        return loss

    def backward(self, batch: Batch | None) -> torch.Tensor:
        """Adds the gradients of this process's share of the mean loss of a batch."""
        if batch is None:
            self.engine.sum_over_ranks({"rows": 0})
            return torch.zeros((), device=self.engine.device)
        with self.engine.autocast():
            logits = self.model(batch)
        loss = self.task.loss(logits, batch)
        if self.engine.data_size == 1:
            share = loss.mean
        else:
            share = loss.total / max(self.engine.sum_over_ranks({"rows": int(loss.count)})["rows"], 1)
        self.engine.backward(share)
        return share.detach()

    def evaluate(self, examples: Examples, what: str) -> Evaluation:
        """Measures the model as it is now."""
        logits = self.logits(examples)
        refuse_non_finite(logits, what)
        return self.task.evaluate(logits, examples)

    def logits(self, examples: Examples) -> np.ndarray[Any, Any]:
        """Returns the logits of all rows."""
        return predict_logits(
            self.model,
            examples,
            batch_size=self.settings.batch_size,
            pad_id=self.pad_id,
            width=self.width,
            engine=self.engine,
        )

    def record(self, **values: object) -> None:
        """Adds a line to metrics.jsonl."""
        if not self.peers.leads:
            return
        seconds = round(time.monotonic() - self.started, 3)
        self.folder.metrics.append({"step": self.updates, **values, "seconds": seconds})

    def save(self) -> None:
        """Writes the model as the best so far."""
        path, form = self.settings.output_model_path, self.settings.model_format
        self.peers.of_leader(f"save-{self.updates}", lambda: write_tensors(path, self.model.state_dict(), form))

    def test(self) -> Evaluation | None:
        """Measures the saved best model on the test table."""
        if self.data.test is None:
            return None
        load_checkpoint(self.model, self.settings.output_model_path)
        found = self.evaluate(self.data.test, "test")
        log.info("test:\n%s", found.text)
        self.record(**_prefixed("test", found))
        return found


def _prefixed(prefix: str, found: Evaluation) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in found.metrics.items()}
