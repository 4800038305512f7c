"""A plan against the model it is about: names and shapes, saved tensors, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tencentpretrain.config import load_config
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.run import RunConfig, load_run
from tencentpretrain.config.train import LoraConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.entry.plan import main
from tencentpretrain.errors import ConfigError, ResourceError
from tencentpretrain.methods.lora import add_lora, mark_only_lora_trainable
from tencentpretrain.model import Model, build_model
from tencentpretrain.plan import machine
from tencentpretrain.plan.activations import Lengths, Numerics
from tencentpretrain.plan.advice import Room, planner, proposals, require_room
from tencentpretrain.plan.layers import layers_of
from tencentpretrain.plan.parameters import weights_of
from tencentpretrain.plan.run import plan_run
from tencentpretrain.plan.sharding import Sharding

MODELS = Path(__file__).resolve().parents[2] / "models"


def plannable() -> list[str]:
    names = []
    for path in sorted(MODELS.rglob("*_config.json")) + sorted(MODELS.rglob("config.json")):
        try:
            config = load_config(path)
        except ConfigError:
            continue
        if not list(config.problems()):
            names.append(str(path.relative_to(MODELS)))
    return names


@pytest.mark.parametrize("name", plannable())
def test_parameters_are_those_of_the_built_model(name: str) -> None:
    config = load_config(MODELS / name)
    if config.streams is not None:  # the files of two-stream models are for fine-tuning; this is their own target
        config = config.model_copy(update={"target": ("clr",)})
    with torch.device("meta"):
        model = Model(config, 1000)
    expected = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    assert {weight.name: weight.shape for weight in weights_of(config, 1000)} == expected


@pytest.mark.parametrize("name", ["bert/tiny_config.json", "t5-v1_1/small_config.json", "llama3/3.2-1b_config.json"])
def test_adapters_are_those_of_the_built_model(name: str) -> None:
    config, lora = load_config(MODELS / name), LoraConfig(use_lora=True, lora_r=4)
    with torch.device("meta"):
        model = Model(config, 1000)
        add_lora(model, r=4, alpha=8)
    mark_only_lora_trainable(model)
    expected = {key: (tuple(value.shape), value.requires_grad) for key, value in model.named_parameters()}
    assert {weight.name: (weight.shape, weight.trained) for weight in weights_of(config, 1000, lora=lora)} == expected


BATCH, SOURCE, TARGET, VOCABULARY = 6, 64, 40, 3000
TRANSFORMERS = ("bert/tiny_", "gpt2/", "t5/small_", "t5-v1_1/small_", "llama3/3.2-1b_", "qwen3/0.6b_", "bloom/1b1_",
                "bart/base_", "transformer/base_", "albert/base_")  # fmt: skip


def small(name: str) -> ModelConfig:
    """A published model with small sizes."""
    config = load_config(MODELS / f"{name}config.json")
    sizes: dict[str, Any] = {"hidden_size": 128, "emb_size": 64 if config.factorized_embedding else 128}
    sizes |= {"num_layers": 3}
    if config.num_heads:
        sizes |= {"num_heads": 4, "feed_forward_size": 320, "max_seq_length": 128}
        sizes |= {"num_kv_heads": config.num_kv_heads and 2, "head_dim": config.head_dim and 48}
    return config.model_copy(update=sizes | ({"num_decoder_layers": 3} if config.decoder else {}))


def saved_bytes(config: ModelConfig, *, half: bool, lora: bool) -> tuple[int, Lengths]:
    """Runs a forward pass; returns the bytes of all storages that autograd keeps, parameters and batch left out."""
    torch.manual_seed(1)
    model = build_model(config, VOCABULARY, seed=1).train()
    if lora:
        add_lora(model, r=4, alpha=8)
        mark_only_lora_trainable(model)
    padded = "mlm" in config.target or config.decoder is not None
    token_ids, segment_ids = torch.randint(5, VOCABULARY, (BATCH, SOURCE)), torch.ones(BATCH, SOURCE).long()
    labels = torch.randint(5, VOCABULARY, (BATCH, TARGET if config.decoder else SOURCE))
    if "mlm" in config.target:
        labels = torch.where(torch.rand(BATCH, SOURCE) < 0.15, labels, 0)
    tgt_ids, tgt_segments = torch.randint(5, VOCABULARY, (BATCH, TARGET)), torch.ones(BATCH, TARGET).long()
    batch = Batch(
        token_ids=token_ids,
        segment_ids=segment_ids,
        labels={name: labels for name in ("mlm", "lm", "bilm_forward", "bilm_backward")} | {"sp": labels[:, 0] * 0},
        decoder_token_ids=tgt_ids if config.decoder else None,
        decoder_segment_ids=tgt_segments if config.decoder else None,
        has_padding=padded,
    )

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            return model(batch).loss

    forward()  # fills the tables of rotary positions
    fixed = [token_ids, segment_ids, labels, tgt_ids, tgt_segments, *model.parameters()]
    if getattr(model.encoder, "rotary", None) is not None:
        fixed += [table for tables in model.encoder.rotary._tables.values() for table in tables]
    known = {tensor.untyped_storage().data_ptr() for tensor in fixed}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    del loss
    predicted = int((labels > 0).sum())
    target = TARGET if config.decoder else 0
    lengths = Lengths(batch=BATCH, source=SOURCE, target=target, predicted=predicted, padded=padded)
    return sum(storage.nbytes() for storage in found.values()), lengths


def planned_bytes(config: ModelConfig, lengths: Lengths, *, half: bool, lora: bool) -> float:
    adapters = LoraConfig(use_lora=True, lora_r=4) if lora else None
    numerics = Numerics(low=2 if half else 4, adapters=(4, 0.0) if lora else None)
    layers = layers_of(config, weights_of(config, VOCABULARY, lora=adapters), lengths, numerics)
    return sum(layer.cost.saved + layer.casts + layer.logits.saved for layer in layers)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_activations_are_what_autograd_saves(name: str, half: bool) -> None:
    config = small(name)
    real, lengths = saved_bytes(config, half=half, lora=False)
    assert planned_bytes(config, lengths, half=half, lora=False) == pytest.approx(real, rel=0.005)


@pytest.mark.parametrize("name", TRANSFORMERS[:-1])
def test_activations_below_adapters_are_what_autograd_saves(name: str) -> None:
    config = small(name)
    real, lengths = saved_bytes(config, half=False, lora=True)
    # The lowest layer needs no gradient, so it keeps a little less than the others.
    assert real <= planned_bytes(config, lengths, half=False, lora=True) * 1.005 <= real * 1.04


@pytest.mark.parametrize("name", ["rnn/lstm_", "rnn/gru_", "rnn/bilstm_", "cnn/gatedcnn_9_"])
def test_activations_of_other_encoders_are_near(name: str) -> None:
    config = small(name)
    real, lengths = saved_bytes(config, half=False, lora=False)
    assert planned_bytes(config, lengths, half=False, lora=False) == pytest.approx(real, rel=0.05)


def bert_run(*flags: str) -> RunConfig:
    path = str(MODELS / "bert" / "base_config.json")
    given = ["--config_path", path, "--vocab_path", "v", "--output_model_path", "o", "--data_processor", "bert"]
    return load_run([*given, *flags])


def test_forward_operations_are_twice_the_weights_and_attention() -> None:
    plan = plan_run(bert_run("--seq_length", "512", "--batch_size", "2"), 21128)
    block = 12 * 768 * 768
    heads = 2 * (77 * (768 * 768 + 768 * 21128) + 768 * 768 + 2 * 768) / 512  # 77 of 512 tokens are predicted
    assert plan.flops.attention == 12 * 4 * 512 * 768
    assert plan.flops.forward == pytest.approx(12 * 2 * block + plan.flops.attention + heads)
    assert plan.flops.training == pytest.approx(3 * plan.flops.forward)


def test_state_is_cut_over_processes_by_stage() -> None:
    run = bert_run("--batch_size", "1", "--seq_length", "16", "--save_checkpoint_steps", "100000")
    totals = [
        plan_run(run, 21128, sharding=Sharding(data_size=4, stage=stage, deepspeed=stage > 0, reduce_bucket=1,
                                               gather_bucket=1, other_device=True)).memory.device.parts
        for stage in range(4)
    ]  # fmt: skip
    count = plan_run(run, 21128).parameters["total"]
    assert [parts["weights"] for parts in totals] == [4 * count] * 3 + [count]
    assert totals[0]["optimizer"] == 8 * count
    assert totals[1]["optimizer"] == 3 * count  # two moments and ZeRO's flat copy, over four
    assert totals[0]["gradients"] == 4 * count
    assert totals[2]["gradients"] == count


def test_proposals_keep_the_samples_of_an_update_and_fit() -> None:
    run = bert_run("--batch_size", "64", "--seq_length", "512")
    make = planner(21128, None)
    room = Room(device=10 << 30)
    found = proposals(run, Sharding(), make, room)
    assert len(found) == 3
    assert "--batch_size" in found[0].flags
    for proposal in found:
        assert proposal.plan.global_batch == 64
        assert proposal.plan.memory.device.total <= room.device


def test_a_run_that_cannot_fit_is_refused_in_words() -> None:
    run = bert_run("--batch_size", "64", "--seq_length", "512")
    with pytest.raises(ResourceError) as error:
        require_room(run, Sharding(), planner(21128, None), Room(device=10 << 30), "this machine")
    text = str(error.value)
    assert "memory: this run needs about" in text
    assert "this machine has 10.0 GiB free" in text
    assert text.count("\n  --") == 3
    assert "--no-plan_check" in text
    assert error.value.exit_code == 5


def test_a_run_that_may_fit_is_let_through() -> None:
    run = bert_run("--batch_size", "64", "--seq_length", "512")
    predicted = plan_run(run, 21128).memory.device.total
    require_room(run, Sharding(), planner(21128, None), Room(device=int(predicted)), "this machine")
    require_room(run, Sharding(), planner(21128, None), Room(device=int(predicted * 0.8)), "this machine")


def test_pretraining_is_refused_before_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from tencentpretrain.engines.local import LocalEngine
    from tencentpretrain.train import room

    run = bert_run("--batch_size", "64", "--seq_length", "512", "--device", "cpu")
    monkeypatch.setattr(room, "host_memory", lambda: 1 << 30)
    with pytest.raises(ResourceError, match=r"this machine has 1\.0 GiB free"):
        room.check_memory(run, LocalEngine(run.precision), 21128, None)
    monkeypatch.setattr(room, "host_memory", lambda: None)
    room.check_memory(run, LocalEngine(run.precision), 21128, None)


def test_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    free = machine.host_memory()
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 100000\n")
    assert machine.host_memory() == 500000
    (tmp_path / "memory.max").write_text("max\n")
    assert free is None or machine.host_memory() > 500000


def plan(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    path = str(MODELS / "bert" / "tiny_config.json")
    code = main(["--config_path", path, "--vocab_size", "1000", "--device", "cpu", "--json", *flags])
    return code, json.loads(capsys.readouterr().out)


def test_the_command_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, values = plan(capsys, "--memory_gb", "4")
    assert code == 0
    assert values["fits"]
    assert values["memory_per_process"]["total"] == pytest.approx(
        sum(size for name, size in values["memory_per_process"].items() if name not in ("total", "at")), rel=1e-6
    )
    code, values = plan(capsys, "--memory_gb", "1.2", "--batch_size", "512", "--seq_length", "512")
    assert code == 5
    assert not values["fits"]
    assert all(proposal["total"] <= 1.2 * 2**30 for proposal in values["proposals"])


def test_a_wrong_size_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--world_size", "0"]) == 2
    assert "world_size: is 0, but must be greater than 0" in capsys.readouterr().err


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from tencentpretrain.entry.plan import main\n"
        f"main(['--config_path', {str(MODELS / 'bert' / 'tiny_config.json')!r}, '--vocab_size', '99', "
        "'--device', 'cpu', '--memory_gb', '9'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
