"""Loading into real models: old names give the same loss, every recorded T5 form, tied and untied heads, memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tencentpretrain.checkpoint.files import read_tensors, write_tensors
from tencentpretrain.checkpoint.loading import load_checkpoint, load_tensors
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.errors import CheckpointMismatch
from tencentpretrain.model import Model, build_model

SIZES: dict[str, Any] = {
    "emb_size": 16, "hidden_size": 16, "feed_forward_size": 32, "num_heads": 2, "num_layers": 2, "hidden_act": "gelu",
    "max_seq_length": 8, "dropout": 0.0,
}  # fmt: skip
BERT = ModelConfig(embedding=("word", "pos", "seg"), target=("mlm", "sp"), **SIZES)
GPT2 = ModelConfig(embedding=("word", "sinusoidalpos"), mask="causal", target=("lm",), **SIZES)
T5 = ModelConfig(
    embedding=("word",), tgt_embedding=("word",), decoder="transformer", num_decoder_layers=2, target=("lm",),
    relative_position_embedding=True, tie_weights=True, share_embedding=True, layernorm="t5",
    layernorm_positioning="pre", **SIZES,
)  # fmt: skip
BART = ModelConfig(
    embedding=("word", "pos"), tgt_embedding=("word", "pos"), decoder="transformer", num_decoder_layers=2,
    target=("lm",), **SIZES,
)  # fmt: skip
BIAS = "relative_pos_emb.relative_attention_bias.weight"
VOCAB = 20


def loss(model: Model) -> Tensor:
    generator = torch.Generator().manual_seed(2)

    def draw() -> Tensor:
        return torch.randint(1, VOCAB, (2, 6), generator=generator)

    labels = {"mlm": draw(), "lm": draw(), "sp": torch.tensor([0, 1])}
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]])
    target = {"decoder_token_ids": draw(), "decoder_segment_ids": torch.ones(2, 6, dtype=torch.long)}
    batch = Batch(
        token_ids=draw(), segment_ids=segments, labels=labels, **(target if model.decoder is not None else {})
    )
    return model.eval()(batch).loss.detach()


def build(config: ModelConfig, seed: int) -> Model:
    model = build_model(config, VOCAB, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)  # so that every tensor counts in the loss
    return model


def old_bert(name: str) -> str:
    name = re.sub(r"^embedding\.(word|pos|seg)\.embedding", lambda m: f"embedding.{OLD_WORDS[m[1]]}_embedding", name)
    name = re.sub(r"^target\.mlm\.linear_", "target.mlm_linear_", name)
    return re.sub(
        r"^target\.sp\.linear_", "target.nsp_linear_", name.replace("target.mlm.layer_norm", "target.layer_norm")
    )


def old_gpt2(name: str) -> str:
    return name.replace("target.lm.output_layer", "target.output_layer").replace("word.embedding", "word_embedding")


def old_bart(name: str) -> str:
    name = re.sub(r"(embedding)\.(word|pos)\.embedding", lambda m: f"{m[1]}.{OLD_WORDS[m[2]]}_embedding", name)
    name = re.sub("^tgt_embedding", "target.embedding", re.sub("^decoder", "target.decoder", name))
    return name.replace("target.lm.output_layer", "target.output_layer")


OLD_WORDS = {"word": "word", "pos": "position", "seg": "segment"}


@pytest.mark.parametrize(("config", "old"), [(BERT, old_bert), (GPT2, old_gpt2), (BART, old_bart)])
def test_an_old_file_gives_the_same_loss(tmp_path: Path, config: ModelConfig, old: Callable[[str], str]) -> None:
    trained = build(config, seed=1)
    tensors = {old(name): tensor for name, tensor in trained.state_dict().items()}
    tensors |= {"embedding.pe": torch.zeros(1)} if config is GPT2 else {}
    write_tensors(tmp_path / "old.bin", tensors)
    model = build(config, seed=2)
    assert not torch.equal(loss(model), loss(trained))
    report = load_checkpoint(model, tmp_path / "old.bin")
    assert torch.equal(loss(model), loss(trained))
    assert len(report.migrated) > (1 if config is GPT2 else 3)
    assert report.unexpected == report.missing == ()


@pytest.mark.parametrize("form", ["encoder", "blocks", "both"])
def test_every_form_of_the_t5_bias_gives_the_same_loss(form: str) -> None:
    trained = build(T5, seed=1)
    tensors = dict(trained.state_dict())
    if form != "encoder":
        tensors |= {f"encoder.transformer.{layer}.{BIAS}": tensors[f"encoder.{BIAS}"] for layer in range(2)}
        tensors[f"encoder.{BIAS}"] = torch.randn_like(tensors[f"encoder.{BIAS}"])
        if form == "blocks":
            del tensors[f"encoder.{BIAS}"]
    model = build(T5, seed=2)
    load_tensors(model, tensors)
    assert torch.equal(loss(model), loss(trained))


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_tied_and_untied_heads_survive_saving_and_loading(tmp_path: Path, form: str) -> None:
    trained = build(T5, seed=1)
    for differs in (False, True):
        if differs:
            trained.untie_head()
            with torch.no_grad():
                trained.get_parameter("target.lm.output_layer.weight").add_(1)
        write_tensors(tmp_path / "m", trained.state_dict(), form)
        assert set(read_tensors(tmp_path / "m")) == set(trained.state_dict())
        model = build(T5, seed=2)
        report = load_checkpoint(model, tmp_path / "m")
        assert bool(report.untied) is differs
        assert model.head_is_tied is not differs
        assert torch.equal(loss(model), loss(trained))


def test_a_refused_file_leaves_the_model_as_it_was() -> None:
    model = build(BERT, seed=1)
    before = loss(model)
    tensors = dict(build(BERT, seed=2).state_dict())
    tensors["encoder.transformer.1.layer_norm_2.gamma"] = torch.ones(3)
    with pytest.raises(CheckpointMismatch, match=r"encoder\.transformer\.1\.layer_norm_2\.gamma: \[3\] in the file"):
        load_tensors(model, tensors)
    assert torch.equal(loss(model), before)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_loading_does_not_hold_a_second_model(tmp_path: Path, form: str) -> None:
    import subprocess
    import sys

    code = (
        "import sys, torch\n"
        "from torch import nn\n"
        "from tencentpretrain.checkpoint.files import write_tensors\n"
        "from tencentpretrain.checkpoint.loading import load_checkpoint\n"
        "class M(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.encoder = nn.ParameterList([torch.zeros(4_000_000) for _ in range(24)])\n"
        "model = M()\n"
        "if sys.argv[1] == 'write':\n"
        "    write_tensors(sys.argv[2], model.state_dict(), sys.argv[3])\n"
        "else:\n"
        "    def anonymous():\n"
        "        lines = open('/proc/self/status').read().splitlines()\n"
        "        return int(next(line for line in lines if line.startswith('RssAnon')).split()[1])\n"
        "    before = anonymous()\n"
        "    load_checkpoint(model, sys.argv[2])\n"
        "    print(anonymous() - before)\n"
    )
    path = str(tmp_path / "m")
    for mode in ("write", "load"):
        done = subprocess.run(
            [sys.executable, "-c", code, mode, path, form], capture_output=True, text=True, check=True
        )
    assert int(done.stdout) < 40_000, "kilobytes of memory of its own, for a file of 384 MB"
