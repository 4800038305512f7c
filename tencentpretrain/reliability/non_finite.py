"""N1, N3: numbers that stop being finite change nothing, and are traced to where they arose."""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tencentpretrain.config.train import OptimConfig, PrecisionConfig, TrainConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.engines.base import MicroStep
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.errors import NonFiniteError
from tencentpretrain.model import Model
from tencentpretrain.optim.build import build_optimizer, build_schedule
from tencentpretrain.optim.state import optimizer_tensors, restore_optimizer
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs
from tencentpretrain.reliability.determinism import model_and_batches
from tencentpretrain.reliability.row import Row, Scale
from tencentpretrain.train.labels import count_labels
from tencentpretrain.train.metrics import Timing
from tencentpretrain.train.non_finite import find_source
from tencentpretrain.train.signals import StopRequest
from tencentpretrain.train.trainer import MOST_SKIPPED, Trainer

_STEPS = 12
_BATCH = 4
_KINDS = ("loss", "gradient", "activation", "weight")
_OVERHEAD = 0.01
_LARGEST_SCALE = 2.0**14
"""Above it the numbers are made to overflow, as float16's do."""


class _Batches:
    """Batches in turn, for ever."""

    waiting_seconds = 0.0

    def __init__(self, batches: Sequence[Batch], position: int = 0) -> None:
        self.batches = batches
        self.position = position

    def __iter__(self) -> Iterator[Batch]:
        while True:
            number = self.position // _BATCH
            self.position += _BATCH
            yield self.batches[number % len(self.batches)]


class _Reports:
    """Keeps what a run reports; calls `at` after each update and `saving` after each report."""

    def __init__(
        self, at: Callable[[int], None] = lambda step: None, saving: Callable[[int], None] = lambda step: None
    ) -> None:
        self.reports: list[Mapping[str, Any]] = []
        self.at = at
        self.saving = saving

    def report(self, step: int, values: Mapping[str, Any], line: str, timing: Timing, rate: float) -> None:
        self.reports.append({"step": step, **values})

    def validation(self, step: int, values: Mapping[str, Any], line: str) -> None: ...

    def save(self, trainer: Trainer, weights_names: Sequence[int]) -> None:
        self.saving(trainer.step)

    def progress(self, step: int) -> None:
        self.at(step)


def _trainer(
    model: Model, batches: _Batches, recorder: _Reports, policy: str = "stop", engine: LocalEngine | None = None
) -> Trainer:
    engine = engine or LocalEngine(PrecisionConfig(device="cpu", threads=1))
    optim = OptimConfig(learning_rate=1e-3)
    train = TrainConfig(
        output_model_path="", total_steps=_STEPS, report_steps=1, save_checkpoint_steps=1, on_non_finite=policy
    )  # fmt: skip
    return Trainer(
        model,
        engine.prepare(model, lambda prepared: build_optimizer(prepared, optim)),
        engine,
        learning_rate=build_schedule(optim, _STEPS),
        batches=batches,
        config=train,
        recorder=recorder,
    )


@dataclass(frozen=True, kw_only=True)
class _Fault:
    """One fault: in the forward passes of which steps (from 1), where, and with which number."""

    kind: str
    module: str
    number: float
    first: int
    last: int
    policy: str


@ROWS.register("N1")
def check_non_finite(scale: Scale, folder: Path) -> Row:
    """NaN and infinity in losses, gradients, activations and weights at a random step."""
    objectives, count = (("mlm", "lm", "t5", "bert"), 200) if scale == "full" else (("mlm",), 24)
    held = wrong_names = 0
    wrong: list[str] = []
    shares = []
    for number, objective in enumerate(objectives):
        flags = runs.prepare(objective, folder / objective, _STEPS, _STEPS, lines=80)
        share = len(range(number, count, len(objectives)))
        found = runs.in_child(lambda flags=flags, share=share, number=number: _strike(flags, share, number))  # type: ignore[misc]
        held += share - len(found["wrong"])
        wrong += [f"{objective}: {text}" for text in found["wrong"]]
        wrong_names += found["clean run named"]
        shares.append(found["overhead"])
    overhead = sum(shares) / len(shares)
    return Row(
        name="N1",
        promised=(
            "NaN or inf in loss, gradient, activation, weight at step k: weights and optimizer untouched; report has "
            "step, rank, first bad module, sample ids; stop, or skip 5 in a row: 200/200; overhead at most 1 %"
        ),
        reached=(
            f"{held}/{count} ({', '.join(objectives)}; one process); the check takes {overhead:.3%} of a step"
            + ("; a clean run named a module" if wrong_names else "")
            + "".join(f"; {text}" for text in wrong[:3])
        ),
        passed=held == count and not wrong_names and overhead <= _OVERHEAD,
    )


def _strike(flags: Sequence[str], count: int, seed: int) -> dict[str, Any]:
    """Injects faults one after the other into runs of one model."""
    draw = random.Random(seed)
    model, batches = model_and_batches(flags, _BATCH, 5)
    initial = _copies(model.state_dict())
    targets = _places(model, batches[0])
    wrong = []
    for number in range(count):
        model.load_state_dict(initial)
        kind = _KINDS[number % len(_KINDS)]
        module = draw.choice(targets) if kind != "loss" else f"target.{model.target.names[0]}"
        first = draw.randint(1, 5)
        policy = ("stop", "skip", "skip")[number // len(_KINDS) % 3]
        last = first + (number // len(_KINDS) % 6) if policy == "skip" and kind != "weight" else first
        fault = _Fault(
            kind=kind,
            module=module,
            number=draw.choice((math.nan, math.inf, -math.inf)),
            first=first,
            last=last if kind != "weight" else _STEPS,
            policy=policy,
        )
        problem = _one(model, batches, fault)
        if problem:
            wrong.append(f"{fault}: {problem}")
    model.load_state_dict(initial)
    return {"wrong": wrong, "overhead": _overhead(model, batches), "clean run named": _clean(model, batches)}


def _places(model: Model, batch: Batch) -> list[str]:
    """Modules with weights whose output every loss depends on, and which run once in a forward pass."""
    calls: dict[str, int] = {}
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
        for name, module in model.named_modules()
        if name.startswith(("encoder.", "decoder.")) and isinstance(module, (nn.Linear, nn.LayerNorm))
    ]
    model.train()
    model(batch)
    for handle in handles:
        handle.remove()
    return [name for name, times in calls.items() if times == 1]


def _one(model: Model, batches: Sequence[Batch], fault: _Fault) -> str:
    """Trains with one fault; returns what was not as promised."""
    held: dict[str, Any] = {"step": 0, "passes": 0}

    def remember() -> dict[str, Tensor]:
        return _copies({**model.state_dict(), **optimizer_tensors(trainer.optimizer)})

    def after(step: int) -> None:
        held["step"] = step
        if fault.first <= step <= fault.last and fault.kind != "weight" and not _equal(held["before"], remember()):
            held["changed"] = step
        held["before"] = remember()
        if step + 1 == fault.first and fault.kind == "weight":
            _harm_weight()
            held["before"] = remember()

    def _harm_weight() -> None:
        with torch.no_grad():
            model.get_parameter(f"{fault.module}.{_weight_of(model, fault.module)}").view(-1)[0] = fault.number

    def harm(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not fault.first <= held["step"] + 1 <= fault.last:
            return None
        if fault.kind == "loss":
            name, loss = next(iter(output.items()))
            return {**output, name: type(loss)(total=loss.total * fault.number, count=loss.count, correct=loss.correct)}
        if fault.kind == "activation":
            return output + fault.number
        output.register_hook(lambda gradient: gradient * math.nan + fault.number)
        return None

    recorder = _Reports(after)
    trainer = _trainer(model, _Batches(batches), recorder, fault.policy)
    held["before"] = remember()
    if fault.kind == "weight" and fault.first == 1:
        _harm_weight()
        held["before"] = remember()
    handle = None if fault.kind == "weight" else model.get_submodule(fault.module).register_forward_hook(harm)
    said = ""
    try:
        trainer.fit(StopRequest())
    except NonFiniteError as error:
        said = str(error)
    finally:
        if handle:
            handle.remove()
    return _judge(fault, held, said, remember(), recorder, trainer)


def _judge(
    fault: _Fault, held: Mapping[str, Any], said: str, end: Mapping[str, Tensor], recorder: _Reports, trainer: Trainer
) -> str:
    length = fault.last - fault.first + 1
    ends = fault.policy == "stop" or length > MOST_SKIPPED
    step = fault.first + (0 if fault.policy == "stop" else MOST_SKIPPED)
    if "changed" in held:
        return f"weights or optimizer changed in step {held['changed']}"
    if not ends:
        if said:
            return f"ended: {said}"
        skipped = [report["step"] for report in recorder.reports if report["skipped_updates"]]
        if skipped != list(range(fault.first, fault.last + 1)):
            return f"skipped {skipped}"
        return "" if trainer.step == _STEPS and all(bool(t.isfinite().all()) for t in end.values()) else "no good end"
    if not _equal(held["before"], end):
        return "weights or optimizer changed"
    first = (step - 1) * _BATCH
    kind = "gradient" if fault.kind == "gradient" else "loss"
    for words in (f"step {step}:", "rank 0", f"samples {first} to {first + _BATCH - 1}", kind):
        if words not in said:
            return f"lacks {words!r}: {said}"
    module = re.search(r"first bad module is ([\w.]+):", said)
    return "" if module and module[1] == fault.module else f"names another module: {said}"


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _weight_of(model: Model, module: str) -> str:
    names = [name for name, _ in model.get_submodule(module).named_parameters(recurse=False)]
    return "bias" if "bias" in names else names[0]


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether all bytes are equal; NaN equals itself."""
    return first.keys() == second.keys() and all(
        tensor.contiguous().view(-1).view(torch.uint8).equal(second[name].contiguous().view(-1).view(torch.uint8))
        for name, tensor in first.items()
    )


def _overhead(model: Model, batches: Sequence[Batch]) -> float:
    """The share of a step that looking for bad numbers takes."""
    trainer = _trainer(model, _Batches(batches), _Reports())
    looked = 0.0
    look: Any = trainer._require_finite

    def timed(*arguments: Any) -> None:
        nonlocal looked
        began = time.perf_counter()
        look(*arguments)
        looked += time.perf_counter() - began

    trainer._require_finite = timed  # type: ignore[method-assign, assignment]
    began = time.perf_counter()
    trainer.fit(StopRequest())
    return looked / (time.perf_counter() - began)


def _clean(model: Model, batches: Sequence[Batch]) -> bool:
    """Whether a step with finite numbers is said to have a bad module."""
    engine = LocalEngine(PrecisionConfig(device="cpu", threads=1))
    steps = [MicroStep(batch=batch, divisor=count_labels([batch], model.config), seed=1) for batch in batches]
    return "first bad module" in find_source(model, engine, steps)


@ROWS.register("N3")
def check_overflow(scale: Scale, folder: Path) -> Row:
    """A loss scale that overflows: updates are skipped and counted, the scale is part of what a run continues from."""
    flags = runs.prepare("lm", folder, _STEPS, _STEPS, lines=80)
    places = range(1, _STEPS) if scale == "full" else (2, 7)
    found = runs.in_child(lambda: _overflow(flags, list(places)))
    return Row(
        name="N3",
        promised="fp16 overflow by a huge scale: skipped and counted, scale state resumes identically: 100 %",
        reached=(
            f"{found['skipped']} updates skipped and counted until the scale fits; {found['equal']}/{len(places)} "
            "places to continue from give the same weights, optimizer, scale and counts (loss scaler on float32, CPU)"
        ),
        passed=found["equal"] == len(places) and found["skipped"] == found["counted"] > 4,
    )


def _overflow(flags: Sequence[str], places: Sequence[int]) -> dict[str, int]:
    model, batches = model_and_batches(flags, _BATCH, 5)
    initial = _copies(model.state_dict())

    def engine() -> LocalEngine:
        made = LocalEngine(PrecisionConfig(device="cpu", threads=1))
        made._scaler = torch.amp.GradScaler("cpu", init_scale=_LARGEST_SCALE * 16, growth_interval=3)
        return made

    def overflow(tensor: Tensor) -> Tensor:
        return tensor * math.inf if trainer.engine.state()["scale"] > _LARGEST_SCALE else tensor

    next(p for name, p in model.named_parameters() if name.startswith("encoder.")).register_hook(overflow)  # type: ignore[no-untyped-call]

    saved: dict[int, tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]] = {}

    def keep(step: int) -> None:
        if step in places:
            moments = _copies(optimizer_tensors(trainer.optimizer))
            state = json.loads(json.dumps({**trainer.state(), "step": step}))
            saved[step] = (state, _copies(model.state_dict()), moments)

    recorder = _Reports(saving=keep)
    trainer = _trainer(model, _Batches(batches), recorder, engine=engine())
    trainer.fit(StopRequest())
    end = _copies({**model.state_dict(), **optimizer_tensors(trainer.optimizer)})
    whole = (trainer.engine.state(), trainer.updates)
    norms = [report["grad_norm"] for report in recorder.reports]
    equal = 0
    for step, (state, weights, moments) in saved.items():
        model.load_state_dict(weights if step else initial)
        again = _Reports()
        trainer = _trainer(model, _Batches(batches, state["position"]), again, engine=engine())
        restore_optimizer(trainer.optimizer, moments)
        trainer.load_state(state)
        trainer.fit(StopRequest())
        same = _equal(end, _copies({**model.state_dict(), **optimizer_tensors(trainer.optimizer)}))
        equal += (
            same and (trainer.engine.state(), trainer.updates) == whole and again.reports == recorder.reports[step:]
        )
    counted = sum(int(report["skipped_updates"]) for report in recorder.reports)
    return {"skipped": sum(norm == 0.0 for norm in norms), "counted": counted, "equal": equal}
