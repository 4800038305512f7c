"""The loop: accumulation keeps the mathematics, non-finite numbers stop it, records are exact."""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.train import OptimConfig, PrecisionConfig, TrainConfig
from tencentpretrain.data.batch import IGNORE_LABEL, Batch
from tencentpretrain.engines.base import Update
from tencentpretrain.engines.local import LocalEngine, choose_device
from tencentpretrain.errors import ConfigError, NonFiniteError, ResourceError
from tencentpretrain.model import Model, build_model
from tencentpretrain.optim.build import build_optimizer, build_schedule
from tencentpretrain.train.labels import count_labels
from tencentpretrain.train.metrics import Meter, MetricsFile, Timing, report_line
from tencentpretrain.train.run_folder import RunFolder
from tencentpretrain.train.signals import StopRequest
from tencentpretrain.train.trainer import Trainer, step_seed

VOCAB = 29
SIZES: dict[str, Any] = {
    "emb_size": 16, "hidden_size": 16, "feed_forward_size": 32, "num_heads": 2, "num_layers": 2, "hidden_act": "gelu",
    "embedding": ("word", "pos"), "max_seq_length": 16, "dropout": 0.0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mlm": {"target": ("mlm",)},
    "mlm+sp": {"target": ("mlm", "sp")},
    "lm": {"target": ("lm",), "mask": "causal"},
    "prefix lm": {"target": ("lm",), "mask": "causal", "prefix_lm_loss": True},
    "smoothed lm": {"target": ("lm",), "mask": "causal", "label_smoothing": 0.1},
    "cls": {"target": ("cls",), "num_labels": 3},
    "mlm+cls": {"target": ("mlm", "cls"), "num_labels": 3},
    "bilm": {"target": ("bilm",), "encoder": "bilstm"},
    "seq2seq": {"target": ("lm",), "decoder": "transformer", "num_decoder_layers": 2},
}


def _model(kind: str, **changes: Any) -> Model:
    return build_model(ModelConfig(**{**SIZES, **MODELS[kind], **changes}), VOCAB, seed=1)


def _batch(size: int, seed: int, length: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, low: int = 1, high: int = VOCAB) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    lengths = draw(size, low=4, high=length + 1)
    place = torch.arange(length)
    segments = torch.where(place < lengths[:, None], torch.where(place < lengths[:, None] // 2, 1, 2), 0)
    masked = (draw(size, length, low=0, high=4) == 0) & (segments > 0)
    masked[:, 1] = True
    tokens = draw(size, length)
    lm = torch.where(draw(size, length, low=0, high=5) == 0, IGNORE_LABEL, tokens)
    return Batch(
        token_ids=tokens,
        segment_ids=segments,
        labels={
            "mlm": torch.where(masked, tokens, 0),
            "sp": draw(size, low=0, high=2),
            "lm": lm,
            "cls": draw(size, low=0, high=3),
            "bilm_forward": lm,
            "bilm_backward": tokens,
        },
        token_count=int(lengths.sum()),
    )


def _for_model(batch: Batch, kind: str) -> Batch:
    if kind != "seq2seq":
        return batch
    return Batch(
        token_ids=batch.token_ids,
        segment_ids=batch.segment_ids,
        labels=batch.labels,
        decoder_token_ids=batch.token_ids,
        decoder_segment_ids=(batch.segment_ids > 0).long(),
        token_count=batch.token_count,
    )


def _cut(batch: Batch, sizes: tuple[int, ...]) -> list[Batch]:
    parts = []
    first = 0
    for size in sizes:
        rows = slice(first, first + size)
        decoder = {}
        if batch.decoder_token_ids is not None and batch.decoder_segment_ids is not None:
            decoder = {
                "decoder_token_ids": batch.decoder_token_ids[rows],
                "decoder_segment_ids": batch.decoder_segment_ids[rows],
            }
        parts.append(
            Batch(
                token_ids=batch.token_ids[rows],
                segment_ids=batch.segment_ids[rows],
                labels={name: label[rows] for name, label in batch.labels.items()},
                token_count=1,
                **decoder,
            )
        )
        first += size
    return parts


class Source:
    """Batches from a function of their number, as a loader gives them."""

    waiting_seconds = 0.0

    def __init__(self, make: Any, batch_size: int = 4, start: int = 0) -> None:
        self.position = start
        self.make, self.batch_size = make, batch_size

    def __iter__(self) -> Iterator[Batch]:
        while True:
            number = self.position // self.batch_size
            self.position += self.batch_size
            yield self.make(number)


class Memory:
    """Remembers what a run records."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.validations: list[int] = []
        self.saved: list[tuple[int, list[int]]] = []
        self.lines: list[str] = []

    def report(self, step: int, values: Any, line: str, timing: Timing, rate: float) -> None:
        self.reports.append({"step": step, "lr": rate, **values})
        self.lines.append(line)

    def validation(self, step: int, values: Any, line: str) -> None:
        self.validations.append(step)

    def save(self, trainer: Trainer, weights_names: Any) -> None:
        self.saved.append((trainer.step, list(weights_names)))

    def progress(self, step: int) -> None:
        pass


def _trainer(model: Model, source: Source | None = None, **settings: Any) -> tuple[Trainer, Memory]:
    memory = Memory()
    train = TrainConfig(output_model_path="x", **{"total_steps": 4, **settings})
    optim = OptimConfig(learning_rate=0.01, warmup=0.0, scheduler="constant")
    engine = LocalEngine(PrecisionConfig(device="cpu"))
    trainer = Trainer(
        model,
        build_optimizer(model, optim),
        engine,
        learning_rate=build_schedule(optim, train.total_steps),
        batches=source or Source(lambda number: _batch(4, number)),
        config=train,
        recorder=memory,
    )
    return trainer, memory


@pytest.mark.parametrize("kind", MODELS)
def test_labels_are_counted_as_the_targets_count_them(kind: str) -> None:
    model = _model(kind)
    for seed in range(5):
        batch = _for_model(_batch(5, seed), kind)
        counts = count_labels([batch], model.config)
        losses = model(batch).losses
        assert {name: counts[name] for name in losses} == {name: int(loss.count) for name, loss in losses.items()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sizes", [(3, 5, 1), (8, 1), (1,) * 9])
def test_accumulation_is_one_big_batch(kind: str, sizes: tuple[int, ...]) -> None:
    whole = _for_model(_batch(9, 3), kind)
    gradients = []
    for window in ([whole], _cut(whole, sizes)):
        model = _model(kind).double()
        trainer, _ = _trainer(model)
        engine = trainer.engine
        assert isinstance(engine, LocalEngine)

        def no_update(optimizer: torch.optim.Optimizer, *_: Any, engine: LocalEngine = engine, **__: Any) -> Update:
            return Update(values=(), gradient_norm=float(engine.gradient_norm(optimizer)), applied=True)

        engine.update = no_update  # type: ignore[method-assign]
        report = trainer.train_step(window)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert math.isfinite(report.gradient_norm)
    assert gradients[0].keys() == gradients[1].keys()
    scale = max(float(gradient.norm()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert float((gradient - gradients[1][name]).norm()) <= 1e-6 * scale, name


def test_step_numbers_reports_and_saves_with_a_partial_last_window() -> None:
    trainer, memory = _trainer(
        _model("mlm"), total_steps=11, accumulation_steps=4, report_steps=4, save_checkpoint_steps=5, eval_steps=4
    )
    trainer.validate = lambda: {"loss": 1.0, "losses": {"mlm": 1.0}, "accuracies": {}}
    trainer.fit(StopRequest())
    assert trainer.step == 11
    assert trainer.updates == 3
    assert [report["step"] for report in memory.reports] == [4, 8, 11]
    assert memory.validations == [4, 8, 11]
    # Step 5 lies within the second update, so its weights are those after the first; step 10 likewise.
    assert memory.saved == [(4, [5]), (8, [10]), (11, [11])]


def test_the_last_step_is_always_saved() -> None:
    trainer, memory = _trainer(_model("mlm"), total_steps=7, save_checkpoint_steps=1000)
    trainer.fit(StopRequest())
    assert memory.saved == [(7, [7])]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_loss_that_is_not_finite_stops_before_the_update(accumulation: int) -> None:
    model = _model("mlm")

    def make(number: int) -> Batch:
        if number == 3:
            with torch.no_grad():
                model.embedding.get_submodule("word").embedding.weight[7] = float("inf")  # type: ignore[index]
        return _batch(4, number)

    trainer, memory = _trainer(model, Source(make), total_steps=12, accumulation_steps=accumulation)
    stream = iter(trainer.batches)
    for _ in range(3 // accumulation):
        trainer.train_step([next(stream) for _ in range(accumulation)])
        trainer.step += accumulation
    first_sample = trainer.batches.position
    window = [next(stream) for _ in range(accumulation)]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = str(trainer.optimizer.state_dict())
    with pytest.raises(NonFiniteError, match="step 4: the loss mlm is not finite for samples 12 to 15") as caught:
        trainer.train_step(window, first_sample)
    assert caught.value.exit_code == 6
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert str(trainer.optimizer.state_dict()) == moments
    assert not memory.saved


def test_a_gradient_that_is_not_finite_stops_before_the_update() -> None:
    model = _model("lm")
    trainer, _ = _trainer(model)
    head = model.get_submodule("target.lm.output_layer")
    head.weight.register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[union-attr]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"gradient is not finite \(first in target.lm.output_layer.weight"):
        trainer.train_step([_batch(4, 0)])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_clipping_is_by_the_global_norm() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = LocalEngine(PrecisionConfig(device="cpu"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    engine.backward((model(torch.full((1, 3), 10.0)) * 7).sum())
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert float(engine.gradient_norm(optimizer)) == pytest.approx(float(expected))
    assert engine.update(optimizer, (), max_norm=0.5).applied
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-5)


def test_too_large_a_loss_scale_skips_the_update_and_shrinks() -> None:
    model = _model("mlm")
    trainer, _ = _trainer(model)
    engine = LocalEngine(PrecisionConfig(device="cpu"))
    engine._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    trainer.engine = engine
    weight = model.get_submodule("target.mlm.linear_1").weight
    weight.register_hook(lambda g: g * float("inf") if engine.state()["scale"] > 2.0**14 else g)  # type: ignore[union-attr]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    skipped = 0
    while not (report := trainer.train_step([_batch(4, 0)])).updated:
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        skipped += 1
        assert engine.state()["scale"] == 2.0 ** (16 - skipped)
    assert skipped == 2
    assert report.gradient_norm == pytest.approx(_plain_norm(), rel=1e-4)
    other = LocalEngine(PrecisionConfig(device="cpu"))
    other._scaler = torch.amp.GradScaler("cpu")
    other.load_state(json.loads(json.dumps(engine.state())))
    assert other.state() == engine.state()


def _plain_norm() -> float:
    trainer, _ = _trainer(_model("mlm"))
    return trainer.train_step([_batch(4, 0)]).gradient_norm


def test_dropout_depends_on_seed_and_step_alone() -> None:
    losses = []
    for disturbance in (0, 5):
        model = _model("mlm", dropout=0.3)
        trainer, memory = _trainer(model, total_steps=3, report_steps=1)
        torch.rand(disturbance)
        trainer.fit(StopRequest())
        losses.append([report["loss"] for report in memory.reports])
    assert losses[0] == losses[1]
    assert len({step_seed(seed, step, rank) for seed in (1, 2) for step in range(50) for rank in range(3)}) == 300


def test_validation_changes_nothing() -> None:
    reports = []
    for validating in (False, True):
        trainer, memory = _trainer(_model("lm", dropout=0.2), total_steps=4, report_steps=1, eval_steps=1)
        if validating:
            from tencentpretrain.train.validation import validate

            held_out = [_batch(4, 100), _batch(4, 101)]
            trainer.validate = lambda held_out=held_out, trainer=trainer: validate(  # type: ignore[misc]
                trainer.model, held_out, trainer.engine
            )
        trainer.fit(StopRequest())
        reports.append([report["loss"] for report in memory.reports])
        assert memory.validations == ([1, 2, 3, 4] if validating else [])
    assert reports[0] == reports[1]


def test_a_signal_finishes_the_step_and_saves() -> None:
    stop = StopRequest()

    def make(number: int) -> Batch:
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        return _batch(4, number)

    trainer, memory = _trainer(_model("mlm"), Source(make), total_steps=50)
    with stop:
        trainer.fit(stop)
    assert stop.exit_code == 143
    assert memory.saved == [(3, [])]


def test_the_second_interrupt_leaves_at_once() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"mlm": 2.5}, "|       20/     100 steps|   123.46 tokens/s| loss    2.50| acc: 0.250|"),
        (
            {"mlm": 2.5, "sp": 0.5},
            "|       20/     100 steps|   123.46 tokens/s| loss    3.00| loss_mlm: 2.500| loss_sp: 0.500"
            "| acc_mlm: 0.250| acc_sp: 0.250|",
        ),
        (
            {"bilm_forward": 2.0, "bilm_backward": 1.0},
            "|       20/     100 steps|   123.46 tokens/s| loss    3.00| loss_forward: 2.000| loss_backward: 1.000"
            "| acc_forward: 0.250| acc_backward: 0.250|",
        ),
        ({"lm": 1.0}, "|       20/     100 steps|   123.46 tokens/s| loss    1.00| acc: 0.250| ppl: 2.718|"),
    ],
)
def test_report_line(losses: dict[str, float], expected: str) -> None:
    meter = Meter(
        losses=losses, correct=dict.fromkeys(losses, 1), counts=dict.fromkeys(losses, 4), micro_steps=1, updates=1
    )
    timing = Timing(tokens_per_second=123.456, data_wait=0.01, remaining_seconds=3723)
    line = report_line(20, 100, meter.summary(), 1e-3, timing)
    assert line.startswith(expected)
    assert line.endswith("| lr: 1.000e-03| grad_norm: 0.000| data_wait: 1.0%| eta: 1:02:03")


def test_metrics_are_rewound_and_a_torn_line_repaired(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        metrics.append({"kind": "train", "step": step, "loss": float("nan")})
    with metrics.path.open("ab") as file:
        file.write(b'{"kind": "train", "step": 15, "lo')
    assert [record["step"] for record in metrics.records()] == [10, 20, 30]
    metrics.rewind(20)
    metrics.append({"kind": "train", "step": 30, "loss": 1.0})
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [10, 20, 30]


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="tpu9"):
        choose_device("tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match="no GPU"):
            choose_device("cuda:3")
        with pytest.raises(ConfigError, match="needs a GPU"):
            LocalEngine(PrecisionConfig(fp16=True))


def _enter(output: str, answers: Any) -> None:
    try:
        with RunFolder(output):
            answers.send("entered")
            time.sleep(60)
    except ResourceError as error:
        answers.send(str(error))


def test_one_run_per_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def start() -> tuple[Any, str]:
        process = context.Process(target=_enter, args=(str(tmp_path / "model"), theirs), daemon=True)
        process.start()
        assert ours.poll(20)
        return process, ours.recv()

    first, answer = start()
    assert answer == "entered"
    second, refusal = start()
    assert f"process {first.pid}" in refusal
    assert "started" in refusal
    first.kill()  # its lock ends with it, though its file stays
    first.join()
    third, answer = start()
    assert answer == "entered"
    third.kill()
    third.join()
    second.join()
