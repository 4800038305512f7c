"""Models cut over processes learn what one process learns, and save what it would save."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.train import OptimConfig, PrecisionConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.engines.base import MicroStep
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.engines.mesh import MeshEngine
from tencentpretrain.entry.pretrain import main as pretrain
from tencentpretrain.errors import ConfigError
from tencentpretrain.model import build_model
from tencentpretrain.optim.build import build_optimizer
from tencentpretrain.parallel.cross_entropy import Vocabulary, split_cross_entropy
from tencentpretrain.parallel.mesh import build_mesh, place_of
from tencentpretrain.parallel.tensor import SplitAttention
from tencentpretrain.reliability import layouts
from tencentpretrain.reliability.layouts import MODELS, VOCAB_SIZE, deviation, fork, train
from tencentpretrain.reliability.runs import prepare, warm_up
from tencentpretrain.targets.loss import cross_entropy_sum, smoothed_sum
from tencentpretrain.train.labels import count_labels
from tencentpretrain.train.validation import validate

STEPS = 4
CPU = PrecisionConfig(device="cpu", threads=1)
LAYOUTS: Mapping[str, tuple[int, int, int, bool]] = {
    "TP 2": (2, 2, 1, False),
    "PP 2": (2, 1, 2, False),
    "TP 2 x DP 2": (4, 2, 1, False),
    "TP 2 x DP 2, ZeRO-1": (4, 2, 1, True),
    "PP 2 x DP 2": (4, 1, 2, False),
    "PP 2 x DP 2, ZeRO-1": (4, 1, 2, True),
    "TP 2 x PP 2": (4, 2, 2, False),
}
"""Processes, tensor size, pipeline size, optimizer split."""


def changed(kind: str, **values: Any) -> ModelConfig:
    return MODELS[kind].model_copy(update=values)


VARIANTS: Mapping[str, ModelConfig] = {
    "alibi": changed("gpt2", alibi_position_embedding=True, embedding=("word",)),
    "albert": changed("bert", parameter_sharing=True, factorized_embedding=True, emb_size=16),
    "qwen3": changed("llama", qk_norm=True, qkv_bias=True, tie_weights=True),
    "smoothed": changed("gpt2", label_smoothing=0.1, ignore_index=True, lm_bias=True, tie_weights=False),
    "bart": changed("t5", relative_position_embedding=False, tgt_embedding=("word", "pos"), share_embedding=False),
    "prefix": changed("gpt2", mask="causal_with_prefix"),
}
"""What the four families do not have."""


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    warm_up()


@pytest.fixture(autouse=True)
def variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "MODELS", {**MODELS, **VARIANTS, "realformer": REALFORMER, "deep": DEEP})


REALFORMER = changed("bert", residual_attention=True)
DEEP = changed("llama", num_layers=5)


def mesh_engine(layout: tuple[int, int, int, bool], config: PrecisionConfig = CPU) -> MeshEngine:
    _, tensor, pipeline, shard_optimizer = layout
    return MeshEngine(config, build_mesh(tensor, pipeline), shard_optimizer=shard_optimizer)


def course(kind: str, layout: tuple[int, int, int, bool] | None, steps: range, **places: Path | None) -> dict[str, Any]:
    def work(rank: int) -> dict[str, Any]:
        return vars(train(kind, LocalEngine(CPU) if layout is None else mesh_engine(layout), steps, **places))

    result: dict[str, Any] = fork(1 if layout is None else layout[0], work)
    return result


def courses(kinds: list[str], layout: tuple[int, int, int, bool] | None) -> dict[str, Any]:
    def work(rank: int) -> dict[str, Any]:
        def engine() -> Any:
            return LocalEngine(CPU) if layout is None else mesh_engine(layout)

        return {kind: vars(train(kind, engine(), range(STEPS))) for kind in kinds}

    result: dict[str, Any] = fork(1 if layout is None else layout[0], work)
    return result


def assert_same(ours: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    for kind, found in ours.items():
        assert deviation(found["losses"], reference[kind]["losses"]) < 1e-5, kind
        assert deviation(found["norms"], reference[kind]["norms"]) < 1e-5, kind


@pytest.fixture(scope="module")
def reference(imported: None) -> dict[str, Any]:
    return courses(list(MODELS), None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_four_families_train_as_on_one_process(name: str, reference: dict[str, Any]) -> None:
    assert_same(courses(list(MODELS), LAYOUTS[name]), reference)


@pytest.mark.parametrize("layout", [(2, 2, 1, False), (2, 1, 2, False)], ids=["TP 2", "PP 2"])
def test_other_models_train_as_on_one_process(layout: tuple[int, int, int, bool]) -> None:
    kinds = list(VARIANTS) + (["realformer"] if layout[1] > 1 else [])
    assert_same(courses(kinds, layout), courses(kinds, None))


def test_key_heads_fewer_than_processes_and_uneven_stages() -> None:
    kinds = ["llama", "deep"]
    expected = courses(kinds, None)
    assert_same(courses(kinds, (4, 4, 1, False)), expected)
    assert_same(courses(kinds, (4, 1, 4, False)), expected)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize(
    "path",
    [
        (None, (2, 2, 1, False), None),
        (None, (2, 1, 2, False), None),
        ((4, 2, 1, True), (4, 2, 2, False), (4, 1, 2, True), None),
    ],
    ids=["1-TP-1", "1-PP-1", "TP ZeRO-TP PP-PP ZeRO-1"],
)
def test_any_layout_continues_any_other(
    kind: str, path: tuple[tuple[int, int, int, bool] | None, ...], tmp_path: Path
) -> None:
    alone = course(kind, None, range(2 * len(path)), save=tmp_path / "alone")
    losses: list[float] = []
    saved: Path | None = None
    for number, layout in enumerate(path):
        target = tmp_path / str(number)
        part = course(kind, layout, range(2 * number, 2 * number + 2), load=saved, save=target)
        losses, saved = losses + part["losses"], target
    assert deviation(losses, alone["losses"]) < 1e-5
    assert saved is not None
    for what in ("model", "optimizer"):
        ours, expected = layouts._merged(saved, what), layouts._merged(tmp_path / "alone", what)
        assert set(ours) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def trained(kind: str, layout: tuple[int, int, int, bool], **settings: Any) -> tuple[MeshEngine, Any, Any]:
    """Trains a few steps with dropout and returns engine, model and optimizer."""
    engine = mesh_engine(layout)
    config = layouts.MODELS[kind].model_copy(update={"dropout": 0.1, **settings})
    model = engine.construct(lambda: build_model(config, VOCAB_SIZE, seed=1)).train()
    optimizer = engine.prepare(model, lambda prepared: build_optimizer(prepared, OptimConfig(learning_rate=1e-2)))
    for step in range(3):
        window = layouts.batches(config, step, engine)
        counts = engine.sum_over_ranks(count_labels(window, config))
        losses = engine.accumulate(
            model, [MicroStep(batch=batch, divisor=counts, seed=7 * step + engine.data_rank) for batch in window]
        )
        engine.update(optimizer, losses, max_norm=1.0)
    return engine, model, optimizer


@pytest.mark.parametrize("layout", [(4, 2, 1, False), (4, 2, 2, False), (4, 2, 1, True)], ids=str)
def test_what_several_processes_hold_stays_equal_to_the_bit(layout: tuple[int, int, int, bool]) -> None:
    def different(kind: str) -> list[str]:
        engine, model, _ = trained(kind, layout)
        part = engine.model.layout
        own = {}
        for name, tensor in model.named_parameters():
            cut = part.slice(name)
            own[part.tied_to[name], None if cut is None else cut.start] = tensor.tolist()
        seen: dict[Any, Any] = {}
        pairs = [pair for held in engine.gather(own) for pair in held.items()]
        return [f"{kind} {key}" for key, values in pairs if seen.setdefault(key, values) != values]

    assert fork(layout[0], lambda rank: [name for kind in ("bert", "t5", "qwen3") for name in different(kind)]) == []


def test_heads_of_each_process_drop_other_probabilities() -> None:
    def work(rank: int) -> list[list[float]]:
        engine = mesh_engine((2, 2, 1, False))
        model = engine.construct(lambda: build_model(changed("gpt2", dropout=0.1), VOCAB_SIZE, seed=1)).train()
        attention = next(module for module in model.modules() if isinstance(module, SplitAttention))
        torch.manual_seed(3)
        with attention._own_random_numbers():
            inside = torch.rand(4).tolist()
        return [*engine.gather(inside), *engine.gather(torch.rand(4).tolist())]

    inside_0, inside_1, after_0, after_1 = fork(2, work)
    assert inside_0 != inside_1
    assert after_0 == after_1


@pytest.mark.parametrize("layout", [(2, 2, 1, False), (2, 1, 2, False), (4, 2, 2, False)], ids=str)
def test_only_a_part_of_the_model_gets_memory(layout: tuple[int, int, int, bool]) -> None:
    whole = sum(tensor.numel() for tensor in build_model(MODELS["llama"], VOCAB_SIZE).parameters())

    def work(rank: int) -> list[list[float]]:
        engine = mesh_engine(layout)
        model = engine.construct(lambda: build_model(MODELS["llama"], VOCAB_SIZE, seed=1))
        assert not any(tensor.is_meta for tensor in model.parameters())
        return engine.gather([sum(tensor.numel() for tensor in model.parameters()) / whole])

    shares = [share for (share,) in fork(layout[0], work)]
    assert max(shares) < 1.1 / layout[0]
    assert sum(shares) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("layout", [(2, 2, 1, False), (2, 1, 2, False), (4, 1, 2, False)], ids=str)
def test_validation_and_saved_weights_are_those_of_one_process(layout: tuple[int, int, int, bool]) -> None:
    def values(engine: Any, kind: str) -> dict[str, Any]:
        model = engine.construct(lambda: build_model(MODELS[kind], VOCAB_SIZE, seed=1))
        engine.place(model)
        dev = [batch for step in range(2) for batch in layouts.batches(MODELS[kind], step, LocalEngine(CPU))]
        wholes = {name: engine.layout.read(name, tensor) for name, tensor in engine.layout.tensors(model).items()}
        expected = build_model(MODELS[kind], VOCAB_SIZE, seed=1).state_dict()
        assert list(wholes) == list(expected)
        assert all(torch.equal(wholes[name], tensor) for name, tensor in expected.items())
        return validate(model, dev, engine)

    def both(engine: Callable[[], Any]) -> dict[str, Any]:
        return {kind: values(engine(), kind) for kind in ("bert", "t5")}

    alone = fork(1, lambda rank: both(lambda: LocalEngine(CPU)))
    found = fork(layout[0], lambda rank: both(lambda: mesh_engine(layout)))
    for kind, expected in alone.items():
        assert found[kind]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert set(found[kind]) == set(expected)


@pytest.mark.parametrize("layout", [(2, 2, 1, False), (2, 1, 2, False)], ids=str)
def test_bfloat16_and_recomputation(layout: tuple[int, int, int, bool]) -> None:
    def losses(engine: Any) -> list[float]:
        config = MODELS["bert"]
        model = engine.construct(lambda: build_model(config, VOCAB_SIZE, seed=1)).train()
        model.set_gradient_checkpointing(True)
        optimizer = engine.prepare(model, lambda prepared: build_optimizer(prepared, OptimConfig(learning_rate=1e-3)))
        found = []
        for step in range(3):
            window = layouts.batches(config, step, engine) * 2
            counts = engine.sum_over_ranks(count_labels(window, config))
            steps = [MicroStep(batch=batch, divisor=counts, seed=step) for batch in window]
            update = engine.update(optimizer, engine.accumulate(model, steps), max_norm=1.0)
            found.append(sum(value.total for values in update.values for value in values.values()))
        return found

    half = PrecisionConfig(device="cpu", threads=1, bf16=True)
    assert deviation(fork(layout[0], lambda rank: losses(mesh_engine(layout, half))),
                     fork(1, lambda rank: losses(LocalEngine(half)))) < 5e-3  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 5])
def test_micro_batches_of_any_number_and_length(count: int) -> None:
    def norm(engine: Any) -> float:
        config = MODELS["llama"]
        model = engine.construct(lambda: build_model(config, VOCAB_SIZE, seed=1)).train()
        optimizer = engine.prepare(model, lambda prepared: build_optimizer(prepared, OptimConfig()))
        window = []
        for number in range(count):
            tokens = torch.randint(1, VOCAB_SIZE, (2, 5 + 3 * number), generator=torch.Generator().manual_seed(number))
            window.append(
                Batch(token_ids=tokens[:, :-1], segment_ids=tokens[:, 1:].sign(), labels={"lm": tokens[:, 1:]})
            )
        counts = count_labels(window, config)
        steps = [MicroStep(batch=batch, divisor=counts, seed=1) for batch in window]
        return engine.update(optimizer, engine.accumulate(model, steps), max_norm=None).gradient_norm

    expected = fork(1, lambda rank: norm(LocalEngine(CPU)))
    assert fork(4, lambda rank: norm(mesh_engine((4, 1, 4, False)))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", [(2, 2, 1, False), (2, 1, 2, False)], ids=str)
def test_packed_documents(layout: tuple[int, int, int, bool]) -> None:
    def norms(engine: Any, kind: str) -> float:
        config = MODELS[kind]
        model = engine.construct(lambda: build_model(config, VOCAB_SIZE, seed=1)).train()
        optimizer = engine.prepare(model, lambda prepared: build_optimizer(prepared, OptimConfig()))
        tokens = torch.randint(1, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(1))
        documents = torch.tensor([[1] * 5 + [2] * 6, [1] * 11, [1] * 3 + [2] * 4 + [0] * 4])
        batch = Batch(
            token_ids=tokens[:, :-1], segment_ids=documents.sign(), labels={"lm": tokens[:, 1:]}, document_ids=documents
        )
        steps = [MicroStep(batch=batch, divisor=count_labels([batch], config), seed=1)]
        return engine.update(optimizer, engine.accumulate(model, steps), max_norm=None).gradient_norm

    alone = fork(1, lambda rank: [norms(LocalEngine(CPU), kind) for kind in ("gpt2", "llama")])
    found = fork(2, lambda rank: [norms(mesh_engine(layout), kind) for kind in ("gpt2", "llama")])
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("layout", [(2, 2, 1, False), (2, 1, 2, False)], ids=str)
def test_a_file_whose_head_differs_from_the_table_unties_it(layout: tuple[int, int, int, bool], tmp_path: Path) -> None:
    from tencentpretrain.checkpoint.files import write_tensors
    from tencentpretrain.checkpoint.loading import load_checkpoint

    tensors = dict(build_model(MODELS["gpt2"], VOCAB_SIZE, seed=4).state_dict())
    tensors["target.lm.output_layer.weight"] = tensors["target.lm.output_layer.weight"] + 0.5
    write_tensors(tmp_path / "start.bin", tensors)

    def work(rank: int) -> bool:
        engine = mesh_engine(layout)
        model = engine.construct(lambda: build_model(MODELS["gpt2"], VOCAB_SIZE, seed=1))
        assert load_checkpoint(model, tmp_path / "start.bin", layout=engine.layout).untied
        found = {name: engine.layout.read(name, tensor) for name, tensor in engine.layout.tensors(model).items()}
        optimizer = engine.prepare(model, lambda prepared: build_optimizer(prepared, OptimConfig()))
        saved = {name for names in engine.gather(list(engine.snapshot(model, optimizer).model)) for name in names}
        return saved == set(tensors) and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

    assert fork(2, work)


@pytest.mark.parametrize("smoothing", [None, 0.1])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_cross_entropy_over_a_split_vocabulary(
    smoothing: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tencentpretrain.parallel.cross_entropy.CHUNK", chunk)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 7)
    rows = torch.randn(5, 8, requires_grad=True)
    labels = torch.tensor([3, 0, -100, 6, 1])
    logits = F.linear(rows, head.weight, head.bias)
    expected = (
        cross_entropy_sum(logits, labels)
        if smoothing is None
        else smoothed_sum(logits, labels, smoothing=smoothing, ignored_label=1)
    )
    expected.total.backward()  # type: ignore[no-untyped-call]

    def work(rank: int) -> bool:
        mesh = build_mesh(2, 1)
        first, last = ((0, 4), (4, 7))[rank]
        part = torch.nn.Linear(8, last - first)
        part.load_state_dict({"weight": head.weight[first:last], "bias": head.bias[first:last]})
        own = rows.detach().clone().requires_grad_()
        vocabulary = Vocabulary(size=7, first=first, group=mesh.tensor)
        loss = split_cross_entropy(own, part, labels, vocabulary, smoothing=smoothing, ignored_label=1)
        loss.total.backward()  # type: ignore[no-untyped-call]
        assert (loss.count, loss.correct) == (expected.count, expected.correct)
        pairs: Iterator[tuple[Tensor | None, Tensor | None]] = iter(
            (
                (loss.total, expected.total),
                (mesh.tensor.sum(own.grad), rows.grad),  # type: ignore[arg-type]
                (part.weight.grad, head.weight.grad[first:last]),  # type: ignore[index]
                (part.bias.grad, head.bias.grad[first:last]),  # type: ignore[index]
            )
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs)
        return True

    assert fork(2, work)


def test_a_run_moves_from_tensor_ranks_to_stages(tmp_path: Path) -> None:
    flags = [*prepare("lm", tmp_path, steps=8, save_steps=4), "--num_workers", "0", "--dropout", "0"]
    flags += ["--accumulation_steps", "2", "--device", "cpu"]

    def run(output: str, processes: int, *more: str) -> dict[str, Tensor]:
        assert (
            fork(processes, lambda rank: pretrain([*flags, "--output_model_path", str(tmp_path / output), *more])) == 0
        )
        weights: dict[str, Tensor] = torch.load(tmp_path / f"{output}-8", weights_only=True)
        return weights

    expected = run("alone", 1)
    run("moved", 2, "--tensor_model_parallel_size", "2")
    shutil.rmtree(tmp_path / "moved.run" / "checkpoints" / "step-00000008")
    (tmp_path / "moved-8").unlink()
    found = run("moved", 2, "--pipeline_model_parallel_size", "2")
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_places_follow_the_published_order() -> None:
    places = [place_of(rank, 8, 2, 2) for rank in range(8)]
    assert [place.tensor for place in places] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [place.stage for place in places] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [place.data for place in places] == [0, 0, 1, 1, 0, 0, 1, 1]
    with pytest.raises(ConfigError, match="multiple of 4"):
        place_of(0, 6, 2, 2)


def fails(work: Callable[[int], Any], world_size: int, match: str) -> None:
    def caught(rank: int) -> str:
        with pytest.raises(ConfigError, match=match):
            work(rank)
        return "refused"

    assert fork(world_size, caught) == "refused"


def test_a_vocabulary_smaller_than_the_group_is_refused() -> None:
    def work(rank: int) -> None:
        mesh_engine((2, 2, 1, False)).construct(lambda: build_model(MODELS["gpt2"], 1))

    fails(work, 2, "cannot share a vocabulary of 1")
