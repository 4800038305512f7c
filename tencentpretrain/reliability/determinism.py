"""D1, D3, D5: what a run's numbers depend on, and what they do not."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tencentpretrain.config.run import load_run
from tencentpretrain.config.train import PrecisionConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.engines.base import MicroStep
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.model import Model, build_model
from tencentpretrain.registry import PROCESSORS, ROWS
from tencentpretrain.reliability import runs
from tencentpretrain.reliability.order import data_of
from tencentpretrain.reliability.row import Row, Scale
from tencentpretrain.train.labels import count_labels

_ACCUMULATION_BOUND = 1e-6
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "checkpointing": (0.0, 0.0),
    "SDPA": (1e-6, 1e-5),
    "compile": (1e-5, 1e-4),
    "bf16": (2e-2, 1e-1),
    "bf16 SDPA against bf16": (1e-2, 1e-1),
}
"""Largest relative difference of the loss and of the gradient, against float32 with the explicit attention."""


@ROWS.register("D1")
def check_twice(scale: Scale, folder: Path) -> Row:
    """The same command twice, for every processor of text."""
    objectives = tuple(runs.OBJECTIVES) if scale == "full" else ("bilm", "t5", "cls_mlm")
    steps = 30 if scale == "full" else 6
    wrong = []
    for objective in objectives:
        flags = [*runs.prepare(objective, folder / objective, steps, steps // 2, lines=120), "--num_workers", "0"]
        first, second = folder / objective / "first", folder / objective / "second"
        for output in (first, second):
            runs.train_alone(flags, output)
        wrong += [f"{objective}: {text}" for text in runs.differences(first, second, steps)]
        shutil.rmtree(folder / objective)
    missing = sorted(set(PROCESSORS.names()) - set(runs.OBJECTIVES))
    equal = len(objectives) - len({text.partition(":")[0] for text in wrong})
    return Row(
        name="D1",
        promised="same command twice: bitwise identical, every objective x 2 runs, CPU",
        reached=(
            f"{equal}/{len(objectives)} objectives x 2 runs of {steps} steps: equal weights, optimizer and metrics"
            + (f"; no case for {', '.join(missing)}" if missing else "")
            + "".join(f"; {text}" for text in wrong[:3])
        ),
        passed=not wrong and not missing,
    )


@ROWS.register("D3")
def check_accumulation(scale: Scale, folder: Path) -> Row:
    """One batch, and the same samples in micro-batches with unequal numbers of labels and a smaller last one."""
    objectives = tuple(runs.OBJECTIVES) if scale == "full" else ("mlm", "prefixlm")
    cuts = ((4, 4, 1), (1,) * 9, (8, 1), (2, 3, 4)) if scale == "full" else ((4, 4, 1),)
    worst, place = 0.0, ""
    for objective in objectives:
        flags = runs.prepare(objective, folder / objective, 4, 2, lines=80)
        found = runs.in_child(lambda flags=flags: _cut_apart(flags, cuts))  # type: ignore[misc]
        if found >= worst:
            worst, place = found, objective
        shutil.rmtree(folder / objective)
    return Row(
        name="D3",
        promised="accumulation against one big batch, every objective, smaller last window: gradient within 1e-6, fp32",
        reached=f"{len(objectives)} objectives x {len(cuts)} ways to cut 9 samples: at most {worst:.1e} ({place})",
        passed=worst <= _ACCUMULATION_BOUND,
    )


def _cut_apart(flags: Sequence[str], cuts: Sequence[Sequence[int]]) -> float:
    """Returns the largest relative difference of the gradient over all ways to cut."""
    model, window = model_and_batches(flags, sum(cuts[0]), 1)
    model.train()
    engine = LocalEngine(PrecisionConfig(device="cpu", threads=1))
    _, whole = gradient(model, engine, window)
    parts = (gradient(model, engine, _cut(window[0], sizes))[1] for sizes in cuts)
    return max(relative(part, whole) for part in parts)


@ROWS.register("D5")
def check_switches(scale: Scale, folder: Path) -> Row:
    """Switches that change how a number is computed, not which number it is."""
    objectives = ("mlm", "lm", "t5") if scale == "full" else ("lm",)
    switches = tuple(_BOUNDS) if scale == "full" else tuple(name for name in _BOUNDS if name != "compile")
    worst = dict.fromkeys(switches, (0.0, 0.0))
    for objective in objectives:
        flags = runs.prepare(objective, folder / objective, 4, 2, lines=80)
        for name, (loss, change) in runs.in_child(lambda flags=flags: _switched(flags, switches)).items():  # type: ignore[misc]
            worst[name] = (max(worst[name][0], loss), max(worst[name][1], change))
    held = all(worst[name][0] <= _BOUNDS[name][0] and worst[name][1] <= _BOUNDS[name][1] for name in switches)
    figures = (
        f"{name} {loss:.1e} / {change:.1e} (bound {_BOUNDS[name][0]:g} / {_BOUNDS[name][1]:g})"
        for name, (loss, change) in worst.items()
    )
    return Row(
        name="D5",
        promised="activation checkpointing, compile, attention kernels on and off: within stated bounds per format",
        reached=f"{', '.join(objectives)}; relative difference of loss / gradient: {', '.join(figures)}",
        passed=held,
    )


def _switched(flags: Sequence[str], switches: Sequence[str]) -> dict[str, tuple[float, float]]:
    attention: Any = importlib.import_module("tencentpretrain.layers.dot_product")
    model, window = model_and_batches(flags, 8, 2)
    model.train()
    plain = LocalEngine(PrecisionConfig(device="cpu", threads=1))
    half = LocalEngine(PrecisionConfig(device="cpu", threads=1, bf16=True))
    explicit = attention.LONGEST_EXPLICIT
    base = gradient(model, plain, window)
    base_half = gradient(model, half, window)
    found = {}
    for name in switches:
        against = base
        engine = half if name.startswith("bf16") else plain
        attention.LONGEST_EXPLICIT = 0 if "SDPA" in name else explicit
        if name == "checkpointing":
            model.set_gradient_checkpointing(True)
        if name == "compile":
            model.compile()
        loss, change = gradient(model, engine, window)
        if name.startswith("bf16 SDPA"):
            against = base_half
        found[name] = (abs(loss - against[0]) / abs(against[0]), relative(change, against[1]))
        model.set_gradient_checkpointing(False)
        if name == "compile":
            model._compiled_call_impl = None
    return found


def model_and_batches(flags: Sequence[str], batch_size: int, count: int) -> tuple[Model, list[Batch]]:
    """Builds the model of a run without dropout, and its first batches."""
    settings = [*flags, "--batch_size", str(batch_size), "--num_workers", "0", "--dropout", "0.0"]
    run = load_run([*settings, "--output_model_path", "unused"])
    data = data_of(settings)
    source, target = data.processor.tokenizer_facts, data.processor.tgt_tokenizer_facts
    model = build_model(
        run.model,
        source.vocab_size,
        tgt_vocab_size=target.vocab_size if run.tgt_tokenizer else None,
        pad_id=source.special_ids["pad"] or 0,
        data_processor=run.data.data_processor,
        seed=1,
    )
    with closing(iter(data.loader(start=0, rank=0, world_size=1))) as batches:  # type: ignore[type-var]
        return model, list(itertools.islice(batches, count))


def gradient(model: Model, engine: LocalEngine, window: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Returns loss and gradient of one update over micro-batches, as training divides them."""
    model.zero_grad(set_to_none=True)
    divisor = count_labels(window, model.config)
    losses = engine.accumulate(model, [MicroStep(batch=batch, divisor=divisor, seed=1) for batch in window])
    total = sum(float(loss.total) / max(divisor[name], 1) for step in losses for name, loss in step.items())
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return total, found


def relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Returns the norm of the difference over the norm of all expected tensors; infinite if names differ."""
    if found.keys() != expected.keys():
        return float("inf")
    difference = torch.stack([(found[name] - expected[name]).double().norm() for name in expected]).norm()
    return float(difference / torch.stack([tensor.double().norm() for tensor in expected.values()]).norm())


def _cut(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """Cuts a batch into smaller ones."""
    ends = list(itertools.accumulate(sizes))

    def part(value: Any, rows: slice) -> Any:
        if isinstance(value, Tensor):
            return value[rows]
        return {name: part(item, rows) for name, item in value.items()} if isinstance(value, Mapping) else value

    names = [field.name for field in dataclasses.fields(Batch)]
    return [
        Batch(**{name: part(getattr(batch, name), slice(end - size, end)) for name in names})
        for size, end in zip(sizes, ends, strict=True)
    ]
