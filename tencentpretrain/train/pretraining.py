"""A pre-training run from its configuration: opens the data, builds or restores the model, trains, saves."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tencentpretrain.checkpoint.loading import load_checkpoint, load_tensors
from tencentpretrain.checkpoint.training import TrainingState, load
from tencentpretrain.checkpoint.zero_files import read_zero_checkpoint
from tencentpretrain.config.cli import Parsed, part_of
from tencentpretrain.config.compatibility import pretrain_problems
from tencentpretrain.config.decode import DEFAULT
from tencentpretrain.config.dialect import published
from tencentpretrain.config.export import to_published
from tencentpretrain.config.run import PRETRAIN_PARTS, RunConfig
from tencentpretrain.data.samples import Dataset, open_dataset
from tencentpretrain.data.settings import with_store_settings
from tencentpretrain.data.store import Store
from tencentpretrain.engines.base import Engine
from tencentpretrain.engines.select import open_engine
from tencentpretrain.errors import ConfigError, DataFormatError
from tencentpretrain.methods.lora import add_lora, is_adapter, mark_only_lora_trainable
from tencentpretrain.model import Model, build_model
from tencentpretrain.optim.build import build_optimizer, build_schedule
from tencentpretrain.tokenizers import build_tokenizer
from tencentpretrain.tokenizers.base import Tokenizer
from tencentpretrain.train.agreement import facts
from tencentpretrain.train.data import TrainingData, open_data
from tencentpretrain.train.peers import Peers
from tencentpretrain.train.recorder import Board, ProgressBar, RunRecorder
from tencentpretrain.train.resume import check_fingerprints, check_unchanged, restore_model
from tencentpretrain.train.room import check_memory
from tencentpretrain.train.run_folder import RunFolder, configure_logging
from tencentpretrain.train.signals import StopRequest
from tencentpretrain.train.trainer import Trainer
from tencentpretrain.train.validation import validate

logger = logging.getLogger(__name__)


def pretrain(run: RunConfig, command: list[str]) -> int:
    """Trains to `total_steps`, continuing the newest checkpoint of the run if there is one.

    Args:
        run: all settings.
        command: the command line, for the record.

    Returns:
        0, or 128 plus the number of the signal that asked for an end; the run is saved in both cases.

    Raises:
        TencentPretrainError: data, checkpoint, configuration, resources or numbers forbid to go on.
    """
    with open_engine(run) as engine, Peers(engine.rank, engine.world_size, run.launch.hang_timeout) as peers:
        return _pretrain(run, command, engine, peers)


def _pretrain(run: RunConfig, command: list[str], engine: Engine, peers: Peers) -> int:
    tokenizer = build_tokenizer(run.tokenizer)
    tgt_tokenizer = build_tokenizer(run.tgt_tokenizer) if run.tgt_tokenizer else None
    dataset = open_dataset(run.data.dataset_path, run.data.data_processor)
    run = with_settings_of_data(run, dataset)
    data = open_data(run.data, dataset, tokenizer, tgt_tokenizer)
    check_labels(run, data)
    if run.train.plan_check:
        check_memory(run, engine, tokenizer.vocab_size, tgt_tokenizer.vocab_size if tgt_tokenizer else None)
    identity = {
        "config": to_published(run, run_paths=True),
        "fingerprints": {**data.fingerprints, **_fingerprints(tokenizer, tgt_tokenizer)},
    }
    peers.agree(facts(identity["config"], identity["fingerprints"], engine.world_size))
    with StopRequest(run.train.time_limit) as stop, contextlib.ExitStack() as stack:
        folder = RunFolder(
            run.train.output_model_path, run.train.save_total_limit, rank=engine.rank, world_size=engine.world_size
        )
        peers.of_leader("run folder", lambda: _open(folder, stack, anew=not run.train.resume))
        bar = stack.enter_context(ProgressBar(run.train.total_steps)) if peers.leads and sys.stderr.isatty() else None
        configure_logging(
            folder.path / (f"log-rank-{engine.rank:04d}.txt" if engine.rank else "log.txt"),
            level=run.train.log_level,
            file_level=run.train.log_file_level,
            extra_path=run.train.log_path if peers.leads else None,
            console=bar.handler if bar else None,
            rank=engine.rank,
        )
        peers.write_stacks_to(folder.path)
        for notice in run.notices:
            logger.info(notice)
        newest = peers.of_leader("checkpoint", lambda: find_checkpoint(run, folder, identity, engine.data_size))
        saved = load(Path(newest)) if newest else None
        step = saved.values["step"] if saved else 0
        if step >= run.train.total_steps:
            logger.info("this run is complete: all %d steps are made", step)
            return 0
        if peers.leads:
            folder.metrics.rewind(step)
            folder.describe(identity["config"], command)
        with peers.file_work("building the model"):
            model = make_model(run, tokenizer, tgt_tokenizer, saved, folder.path, engine)
            moments = saved.optimizer if saved else load_foreign(run, model, engine)
            optimizer = engine.prepare(model, lambda prepared: build_optimizer(prepared, run.optim))
            if moments:
                engine.restore_optimizer(optimizer, moments)
        dev_batches = data.dev_batches(run.train.eval_batches)
        recorder = stack.enter_context(
            RunRecorder(
                folder,
                published=is_adapter if run.lora.use_lora else lambda name: True,
                model_format=run.train.model_format,
                async_save=run.train.async_save,
                identity=identity,
                peers=peers,
                board=_board(run, folder, step) if peers.leads else None,
                bar=bar,
            )
        )
        batches = data.loader(
            start=saved.values["position"] if saved else 0, rank=engine.data_rank, world_size=engine.data_size
        )
        if batches.epoch_size < engine.data_size:
            raise DataFormatError(
                f"{dataset.path}: has {batches.epoch_size} samples for {engine.data_size} processes, so some would "
                "have none; use fewer processes or more data"
            )
        trainer = Trainer(
            model,
            optimizer,
            engine,
            learning_rate=build_schedule(run.optim, -(-run.train.total_steps // run.train.accumulation_steps)),
            batches=batches,
            config=run.train,
            recorder=recorder,
            seed=run.data.seed,
            max_grad_norm=run.optim.max_grad_norm,
            validate=(lambda: validate(model, dev_batches, engine, peers.progress)) if dev_batches else None,
        )
        if saved:
            trainer.load_state(saved.values)
        logger.info(_opening(model, engine, data, trainer.step, run))
        trainer.fit(stop)
        recorder.finish()
        if peers.leads:
            recorder.plot()
        return stop.exit_code if trainer.step < run.train.total_steps else 0


def with_settings_of_data(run: RunConfig, dataset: Dataset) -> RunConfig:
    """Returns the run with the data settings that `preprocess.py` was given, where this command gives none.

    Raises:
        ConfigError: together with them, the settings contradict each other.
    """
    data = with_store_settings(run.data, dataset, lambda name: run.origin.get(published(name), DEFAULT) != DEFAULT)
    if data == run.data:
        return run
    sections = {part_of(part).name: getattr(run, part_of(part).name) for part in PRETRAIN_PARTS}
    parsed = Parsed(sections={**sections, "data": data}, origin=run.origin)
    problems = [*data.problems(), *pretrain_problems(parsed)]
    if problems:
        raise ConfigError(problems, source=f"with the settings of {dataset.path}")
    changed = {name: value for name, value in data.model_dump().items() if value != getattr(run.data, name)}
    notice = f"from {dataset.path}: " + ", ".join(f"{published(name)} {value}" for name, value in changed.items())
    return replace(run, data=data, notices=(*run.notices, notice))


def check_labels(run: RunConfig, data: TrainingData) -> None:
    """Refuses classes of the data set that the model has no output for."""
    classes = run.model.num_labels
    for store in (data.dataset, data.dev_dataset):
        if classes is None or "cls" not in run.model.target or not isinstance(store, Store) or not len(store.labels):
            continue
        least, most = int(store.labels.min()), int(store.labels.max())
        if least < 0 or most >= classes:
            raise DataFormatError(
                f"{store.path}: has labels from {least} to {most}, but labels_num {classes} allows 0 to {classes - 1}"
            )


def _open(folder: RunFolder, stack: contextlib.ExitStack, *, anew: bool) -> None:
    stack.enter_context(folder)
    if anew:
        folder.start_anew()


def find_checkpoint(run: RunConfig, folder: RunFolder, identity: Mapping[str, Any], data_size: int = 1) -> str | None:
    """Returns the checkpoint to continue from, or None for a new run.

    Raises:
        CheckpointMismatch, ConfigError, DataFormatError: there is a run, but it cannot be continued.
    """
    folder.checkpoints.tidy()
    path = folder.checkpoints.newest()
    if path is None:
        return None
    state = load(path)
    check_fingerprints(path, state.values["fingerprints"], identity["fingerprints"])
    sizes = (state.values.get("data_size", 1), data_size)
    for change in check_unchanged(path, state.values["config"], identity["config"], run.train.allow_change, sizes):
        logger.info("changed since %s: %s", path.name, change)
    logger.info("continuing after step %d from %s", state.values["step"], path)
    return str(path)


def make_model(
    run: RunConfig,
    tokenizer: Tokenizer,
    tgt_tokenizer: Tokenizer | None,
    saved: TrainingState | None,
    place: Path,
    engine: Engine,
) -> Model:
    """Builds the model with random, given or saved weights."""
    model = engine.construct(
        lambda: build_model(
            run.model,
            tokenizer.vocab_size,
            tgt_vocab_size=tgt_tokenizer.vocab_size if tgt_tokenizer else None,
            pad_id=tokenizer.pad_id,
            data_processor=run.data.data_processor,
            initialize=saved is None,
            deep_init=run.train.deep_init,
            seed=run.data.seed,
        )
    )
    if saved is None and run.train.pretrained_model_path:
        report = load_checkpoint(
            model,
            run.train.pretrained_model_path,
            strict=run.train.strict_loading,
            allow_missing=run.train.allow_missing,
            ignore_unexpected=("target.", "output_layer"),  # heads of other targets and of tasks
            resize_vocab=run.train.resize_vocab,
            layout=engine.layout,
        )
        logger.info(report.text())
    if run.lora.use_lora:
        torch.manual_seed(run.data.seed)
        add_lora(model, r=run.lora.lora_r, alpha=run.lora.lora_alpha, dropout=run.lora.lora_dropout)
        mark_only_lora_trainable(model)
        if saved is None and run.lora.lora_pretrained_model_path:
            base = [name for name in model.state_dict() if "lora_" not in name]
            adapters = run.lora.lora_pretrained_model_path
            logger.info(load_checkpoint(model, adapters, allow_missing=base, layout=engine.layout).text())
    if saved is not None:
        restore_model(model, saved, place, engine.layout)
    for module in model.modules():
        if hasattr(type(module), "gradient_checkpointing"):
            module.gradient_checkpointing = run.precision.gradient_checkpointing  # type: ignore[assignment]
    return model


def load_foreign(run: RunConfig, model: Model, engine: Engine) -> Mapping[str, Tensor]:
    """Gives the model the weights of a DeepSpeed directory, if one is its start, and returns the optimizer's state."""
    path = run.launch.resume_from_checkpoint
    if path is None:
        return {}
    start = read_zero_checkpoint(path)
    logger.info(load_tensors(model, start.model, source=str(start.path), layout=engine.layout).text())
    what = "weights and optimizer" if start.optimizer else "weights alone (it has no optimizer state of AdamW)"
    logger.info("%s: takes up its %s; steps, schedule and data begin anew", start.path, what)
    return start.optimizer


def _fingerprints(tokenizer: Tokenizer, tgt_tokenizer: Tokenizer | None) -> dict[str, str]:
    tgt = {} if tgt_tokenizer is None else {"tgt_tokenizer": tgt_tokenizer.fingerprint}
    return {"tokenizer": tokenizer.fingerprint, **tgt}


def _opening(model: Model, engine: Engine, data: TrainingData, step: int, run: RunConfig) -> str:
    trained = (
        math.prod(engine.layout.shape(name, parameter))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )
    processes = f" in {engine.world_size} processes" if engine.world_size > 1 else ""
    return (
        f"{sum(trained):,} trainable parameters on {engine.device}{processes}, "
        f"{len(data.dataset):,} records in {data.dataset.path}, "
        f"steps {step + 1} to {run.train.total_steps}"
    )


def _board(run: RunConfig, folder: RunFolder, step: int) -> Board | None:
    if not run.train.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("tensorboard: needs the package tensorboard; install the extra 'track'") from None
    board: Board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)
    return board
