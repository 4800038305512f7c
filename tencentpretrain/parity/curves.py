"""Checks short training runs against recorded ones: exact trajectories, and curves within the spread of seeds."""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from tencentpretrain.checkpoint.loading import load_tensors
from tencentpretrain.config.data import CorpusConfig, DataConfig
from tencentpretrain.config.train import OptimConfig, PrecisionConfig, TrainConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.data.build import build_store
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.model import Model, build_model
from tencentpretrain.optim.build import build_optimizer, build_schedule
from tencentpretrain.parity.base import CaseResult
from tencentpretrain.parity.models import model_config
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer
from tencentpretrain.tokenizers.base import Tokenizer
from tencentpretrain.train.data import open_data
from tencentpretrain.train.labels import count_labels
from tencentpretrain.train.trainer import BatchSource, StepReport, Trainer

_LOSS_ATOL = 1e-4
_PARAMETER_ATOL = 1e-4
_KEY_BIAS = ".self_attn.linear_layers.1.bias"
"""The gradient of a key bias is zero under softmax; adafactor scales its rounding noise to full size."""

_WINDOW_ALLOWANCE = 0.25
_LAST_WINDOWS = 5
_LAST_ALLOWANCE = 0.1


def check(path: Path) -> list[CaseResult]:
    """Repeats one recorded run.

    Args:
        path: the record, in a folder `curves` beside `data`; the tensors of `<name>.json` are in `<name>.safetensors`.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    run = _check_curve if "over_seeds" in record else _check_trajectory
    return run(path, record)


class _Batches:
    """Batches in the order they stand."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.position = 0
        self.waiting_seconds = 0.0
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self._batches


def _check_trajectory(path: Path, record: Mapping[str, Any]) -> list[CaseResult]:
    tensors = load_file(path.with_suffix(".safetensors"))
    tokenizer = _tokenizer(path.parents[1] / record["vocab"])
    data = DataConfig(data_processor=record["data_processor"], seq_length=record["seq_length"], loss_on_final_pad=True)
    model = build_model(model_config(record["config"]), tokenizer.vocab_size, pad_id=tokenizer.pad_id, initialize=False)
    load_tensors(model, {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("w0/")})
    batches = _recorded_batches(record["instances"], record["pretrain_flags"]["batch_size"], data, tokenizer)
    trainer = _trainer(model, record["pretrain_flags"], _Batches(batches))
    steps = [step for report in _train(trainer) for step in report.values]

    losses = [sum(value.mean for value in step.values()) for step in steps]
    worst_loss = _largest_difference(losses, record["losses"])
    for name in next(iter(steps)):
        if f"losses_{name}" in record:
            worst_loss = max(
                worst_loss, _largest_difference([step[name].mean for step in steps], record[f"losses_{name}"])
            )
    noisy = record["pretrain_flags"]["optimizer"] == "adafactor"
    final = model.state_dict()
    differences = {
        name: float((final[name[3:]] - recorded).abs().max())
        for name, recorded in tensors.items()
        if name.startswith("w1/") and not (noisy and name.endswith(_KEY_BIAS))
    }
    farthest = max(differences, key=lambda name: differences[name])
    return [
        CaseResult(name=f"{path.stem} losses", passed=worst_loss <= _LOSS_ATOL, deviation=worst_loss),
        CaseResult(
            name=f"{path.stem} final parameters",
            passed=differences[farthest] <= _PARAMETER_ATOL,
            deviation=differences[farthest],
            detail="" if differences[farthest] <= _PARAMETER_ATOL else farthest,
        ),
    ]


def _check_curve(path: Path, record: Mapping[str, Any]) -> list[CaseResult]:
    tokenizer_config = TokenizerConfig(vocab_path=str(path.parents[1] / record["vocab"]))
    tokenizer = build_tokenizer(tokenizer_config)
    flags, recorded = record["preprocess_flags"], record["over_seeds"]
    seed = int(str(record["pretrain_flags"]["seed"]).split(",")[0])
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(
            data_processor=flags["data_processor"],
            dataset_path=f"{folder}/store",
            seq_length=flags["seq_length"],
            dup_factor=flags.get("dup_factor", 5),
            batch_size=record["pretrain_flags"]["batch_size"],
            shuffle=False,
            keep_blank_lines=True,
            loss_on_final_pad=True,
            num_workers=0,
        )
        processor = PROCESSORS.get(data.data_processor)
        result = build_store(
            CorpusConfig(corpus_path=str(path.parents[1] / record["corpus"]), max_rejected=1.0),
            data.dataset_path,
            processor=data.data_processor,
            record_format=processor.corpus_format(json_lines=False),
            tokenizer=functools.partial(build_tokenizer, tokenizer_config),
        )
        loader = open_data(data, result.store, tokenizer, None).loader(start=0, rank=0, world_size=1)
        config = model_config(record["config"])
        model = build_model(config, tokenizer.vocab_size, pad_id=tokenizer.pad_id, seed=seed)
        trainer = _trainer(model, {**record["pretrain_flags"], "seed": seed}, loader)
        losses = [sum(value.mean for value in report.values[0].values()) for report in _train(trainer)]
    width = record["pretrain_flags"]["report_steps"]
    means = [float(np.mean(losses[entry["step"] - width : entry["step"]])) for entry in recorded]
    differences = [mean - entry["loss"]["mean"] for mean, entry in zip(means, recorded, strict=True)]
    window, last = max(map(abs, differences)), abs(float(np.mean(differences[-_LAST_WINDOWS:])))
    return [
        CaseResult(
            name=f"{path.stem} each window",
            passed=window <= _WINDOW_ALLOWANCE,
            deviation=window,
            detail=f"allowed {_WINDOW_ALLOWANCE}; loss {means[0]:.2f} to {means[-1]:.2f}",
        ),
        CaseResult(
            name=f"{path.stem} average of the last {_LAST_WINDOWS} windows",
            passed=last <= _LAST_ALLOWANCE,
            deviation=last,
            detail=f"allowed {_LAST_ALLOWANCE}",
        ),
    ]


def _trainer(model: Model, flags: Mapping[str, Any], batches: BatchSource) -> Trainer:
    """The recorded training set-up: decay by old names, each micro-batch divided by its own labels."""
    train = TrainConfig(
        output_model_path="", total_steps=flags["total_steps"], accumulation_steps=flags.get("accumulation_steps", 1)
    )
    optim = OptimConfig(
        learning_rate=flags["learning_rate"],
        warmup=flags["warmup"],
        optimizer=flags.get("optimizer", "adamw"),
        scheduler=flags.get("scheduler", "linear"),
        decay_groups="name",
    )
    engine = LocalEngine(PrecisionConfig(device="cpu", threads=1))  # as recorded

    def divisors(window: Sequence[Batch]) -> list[dict[str, float]]:
        counts = [count_labels([batch], model.config) for batch in window]
        return [{name: count * len(window) for name, count in batch.items()} for batch in counts]

    return Trainer(
        model,
        engine.prepare(model, lambda placed: build_optimizer(placed, optim)),
        engine,
        # The recorded schedules count micro-steps in their length, but advance with updates.
        learning_rate=build_schedule(optim, train.total_steps),
        batches=batches,
        config=train,
        recorder=None,  # type: ignore[arg-type]
        seed=flags["seed"],
        divisors=divisors,
    )


def _train(trainer: Trainer) -> Iterator[StepReport]:
    """Takes every update of a run and yields its report."""
    trainer.model.train()
    batches = iter(trainer.batches)
    while trainer.step < trainer.config.total_steps:
        window = list(itertools.islice(batches, trainer.config.accumulation_steps))
        yield trainer.train_step(window)
        trainer.step += len(window)
        trainer.updates += 1


def _recorded_batches(
    instances: Sequence[Any], batch_size: int, data: DataConfig, tokenizer: Tokenizer
) -> Iterator[Batch]:
    processor = PROCESSORS.get(data.data_processor)(data, tokenizer)
    examples = [processor.decode_instance(instance, np.random.default_rng(0)) for instance in instances]
    while True:
        for start in range(0, len(examples), batch_size):
            yield processor.collate(examples[start : start + batch_size])


def _tokenizer(vocabulary: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(vocab_path=str(vocabulary)))


def _largest_difference(ours: Sequence[float], recorded: Sequence[float]) -> float:
    return max(abs(mine - theirs) for mine, theirs in zip(ours, recorded, strict=True))
