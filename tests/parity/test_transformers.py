"""Equality with `transformers`: random models of theirs, saved, read through the family's table and built from JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tencentpretrain.checkpoint.files import read_tensors
from tencentpretrain.checkpoint.loading import load_tensors
from tencentpretrain.config import load_config
from tencentpretrain.data.batch import Batch
from tencentpretrain.model import Model, build_model
from tencentpretrain.registry import FAMILIES
from tencentpretrain.taps import Taps

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

TOLERANCE = 1e-4
"""Logits are of size 1 to 30 in float32; sums in another order move them by about 1e-6 of that."""

VOCAB = 61
LENGTHS = (11, 7, 4)
TGT_LENGTHS = (6, 9, 3)


@dataclass(frozen=True)
class Case:
    """A model of theirs.

    Fields:
        family: our table.
        model_class, config_class: theirs.
        config: settings of theirs.
        prepare: changes the random model before it is saved.
        lengths, tgt_lengths: real tokens of each sample, on the source and on the target side.
        switch: published keys that must matter: with these values the logits are off by more than the tolerance.
    """

    family: str
    model_class: str
    config_class: str
    config: Mapping[str, Any]
    prepare: Callable[[nn.Module], None] = lambda model: None
    lengths: tuple[int, ...] = LENGTHS
    tgt_lengths: tuple[int, ...] = TGT_LENGTHS
    switch: Mapping[str, Any] = field(default_factory=dict)


def untie(model: nn.Module) -> None:
    """Gives a head of theirs weights of its own: T5 1.1 files have one, though newer configs call it tied."""
    generator = torch.Generator().manual_seed(5)
    model.lm_head.weight = nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=generator) / 8)


def clear_unread_rows(model: nn.Module) -> None:
    """BART never looks the first two rows of its position tables up; our tables do not keep them."""
    for side in (model.model.encoder, model.model.decoder):
        side.embed_positions.weight.data[:2] = 0


BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 40,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_inner": 48,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
}


def rope(theta: float, kind: str = "default", **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": kind, **scaling}}


def llama(switch: Mapping[str, Any], lengths: tuple[int, ...] = LENGTHS, **settings: Any) -> Case:
    return Case("llama", "LlamaForCausalLM", "LlamaConfig", {**LLAMA, **settings}, lengths=lengths, switch=switch)


LONG = (40, 23, 5)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}

CASES: dict[str, Case] = {
    "bert": Case("bert", "BertForPreTraining", "BertConfig", BERT, switch={"layernorm_form": "toolkit"}),
    "bert-gelu-tanh": Case(
        "bert", "BertForPreTraining", "BertConfig", {**BERT, "hidden_act": "gelu_new"}, switch={"hidden_act": "gelu"}
    ),
    "gpt2": Case("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2, switch={"hidden_act": "gelu"}),
    "gpt2-unscaled": Case(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {**GPT2, "scale_attn_weights": False},
        switch={"remove_attention_scale": False},
    ),
    "t5": Case("t5", "T5ForConditionalGeneration", "T5Config", T5, switch={"lm_scale": False}),
    "t5-1.1": Case(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        prepare=untie,
        switch={"remove_attention_scale": False},
    ),
    "t5-long": Case(  # every bucket up to the largest distance, and its rounding
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "relative_attention_num_buckets": 32},
        lengths=(300, 60),
        tgt_lengths=(60, 290),
        switch={"lm_scale": False},
    ),
    "bart": Case(
        "bart",
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
        prepare=clear_unread_rows,
        switch={"layernorm_eps": 0.1},
    ),
    "llama1": llama({"rope_theta": 500.0}, num_key_value_heads=4, rms_norm_eps=1e-6),
    "llama2-grouped": llama({"layernorm_eps": 0.1}, rms_norm_eps=1e-5),
    "llama-biased-tied": llama({"rope_theta": 500.0}, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-wide-heads": llama({"rope_width": "hidden"}, head_dim=12),
    "llama3": llama({"rope_scaling": None}, LONG, **rope(500.0, "llama3", **LLAMA3)),
    "llama-linear": llama({"rope_scaling": None}, LONG, **rope(1e4, "linear", factor=2.0)),
    "llama-dynamic": llama(
        {"rope_scaling": None}, LONG, **{**rope(1e4, "dynamic", factor=4.0), "max_position_embeddings": 16}
    ),
    "llama-yarn": llama(
        {"rope_scaling": None}, LONG, **rope(100.0, "yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "qwen2": Case("qwen2", "Qwen2ForCausalLM", "Qwen2Config", {**LLAMA, **rope(1e6)}, switch={"rope_theta": 1e4}),
    "qwen2-window": Case(
        "qwen2",
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        switch={"sliding_window": None},
    ),
    "qwen3": Case(
        "qwen3",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**LLAMA, "head_dim": 12, "tie_word_embeddings": True},
        switch={"layernorm_eps": 0.1},
    ),
    "mistral-window": Case(
        "mistral",
        "MistralForCausalLM",
        "MistralConfig",
        {**LLAMA, "sliding_window": 4},
        switch={"sliding_window": None},
    ),
    "mistral-full": Case(
        "mistral",
        "MistralForCausalLM",
        "MistralConfig",
        {**LLAMA, "sliding_window": None, "head_dim": 6},
        switch={"rope_theta": 500.0},
    ),
}


def random_model(case: Case) -> Any:
    """Builds a model of theirs in which nothing is neutral: norms, biases and buffers are drawn too."""
    config = getattr(transformers, case.config_class)(**case.config, attn_implementation="eager")
    model = getattr(transformers, case.model_class)(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                is_table = "embed" in name or "shared" in name or ".wte" in name or ".wpe" in name
                parameter.copy_(noise if is_table else noise * parameter.size(-1) ** -0.5)
            else:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name.lower() and "bias" not in name else 0.0))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape, generator=generator))
    case.prepare(model)
    return model


def token_batch(lengths: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Returns token ids and mask (B, S), padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return torch.randint(3, VOCAB, mask.shape, generator=generator) * mask, mask


@dataclass(frozen=True)
class Outputs:
    """Logits of both sides at real positions, by head."""

    ours: Mapping[str, Tensor]
    theirs: Mapping[str, Tensor]

    @property
    def deviation(self) -> float:
        return max(float((self.ours[head] - self.theirs[head]).abs().max()) for head in self.theirs)


def outputs(case: Case, theirs: Any, ours: Model) -> Outputs:
    """Runs the same batch through both models."""
    token_ids, mask = token_batch(case.lengths, 7)
    segment_ids = mask.long()
    inputs = {"input_ids": token_ids, "attention_mask": mask.long()}
    decoder: dict[str, Tensor] = {}
    counted = mask
    if case.family == "bert":
        for row, length in enumerate(case.lengths):
            segment_ids[row, length // 2 : length] = 2
        inputs["token_type_ids"] = (segment_ids == 2).long()
    if case.family in ("t5", "bart"):
        decoder_ids, counted = token_batch(case.tgt_lengths, 8)
        inputs |= {"decoder_input_ids": decoder_ids, "decoder_attention_mask": counted.long()}
        decoder = {"decoder_token_ids": decoder_ids, "decoder_segment_ids": counted.long()}
    labels = {"lm": torch.ones_like(counted.long())}
    if case.family == "bert":
        labels = {"mlm": counted.long(), "sp": torch.zeros(len(case.lengths), dtype=torch.long)}
    batch = Batch(token_ids=token_ids, segment_ids=segment_ids, labels=labels, **decoder)
    taps = [f"logits.{name}" for name in labels]
    with torch.no_grad():
        expected = theirs(**inputs)
        with Taps(ours, *taps) as read:
            ours(batch)
        found = {name: read[f"logits.{name}"] for name in labels}
    if case.family == "bert":
        return Outputs(found, {"mlm": expected.prediction_logits[counted], "sp": expected.seq_relationship_logits})
    return Outputs({"lm": found["lm"]}, {"lm": expected.logits[counted]})


def build(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Model:
    """Writes the model JSON, reads it as a user's file is read, and loads every tensor."""
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    model = build_model(load_config(path), VOCAB).eval()
    report = load_tensors(model, tensors, strict=True)
    assert (report.missing, report.unexpected, report.misshapen) == ((), (), ())
    return model


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    case = CASES[name]
    theirs = random_model(case)
    saved = tmp_path / "theirs"
    theirs.save_pretrained(saved)
    family = FAMILIES.get(case.family)
    hf_config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    config, tensors = family.to_ours(hf_config, read_tensors(saved / "model.safetensors"))

    # Logits.
    ours = build(config, tensors, tmp_path)
    result = outputs(case, theirs, ours)
    record_property("deviation", result.deviation)
    print(f"{name}: largest deviation {result.deviation:.1e}")
    assert result.deviation <= TOLERANCE
    assert all(logits.abs().max() > 0.5 for logits in result.theirs.values())

    # Back again, every tensor bit for bit, tied ones under all of their names.
    back = family.to_theirs(config, ours.state_dict())
    original = theirs.state_dict()
    assert set(back) == set(original)
    changed = [key for key, tensor in original.items() if not torch.equal(back[key], tensor)]
    assert not changed
    assert all(back[key].dtype == tensor.dtype for key, tensor in original.items())

    # The settings that the family chose are needed: the comparison can fail.
    assert set(case.switch) <= {*config, "rope_width"}
    other = build({**config, **case.switch}, tensors, tmp_path)
    assert outputs(case, theirs, other).deviation > TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_tied_tensors_are_one_parameter(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    theirs = random_model(case)
    config, tensors = FAMILIES.get(case.family).to_ours(theirs.config.to_dict(), theirs.state_dict())
    ours = build(config, tensors, tmp_path)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) + extra(case)


@pytest.mark.parametrize("name", ["gpt2", "bart", "t5", "qwen3"])
def test_files_saved_from_the_body_alone_are_read(name: str, tmp_path: Path) -> None:
    """GPT-2, BART and others were published without their head and, with it, without the prefix of the names."""
    case = CASES[name]
    theirs = random_model(case)
    family = FAMILIES.get(case.family)
    _, whole = family.to_ours(theirs.config.to_dict(), theirs.state_dict())
    body = theirs if case.family == "t5" else theirs.base_model
    body.save_pretrained(tmp_path)
    hf_config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config, tensors = family.to_ours(hf_config, read_tensors(tmp_path / "model.safetensors"))
    assert set(whole) - set(tensors) == ({"target.lm.output_layer.bias"} if name == "bart" else set())
    assert config.get("has_lmtarget_bias", False) is False
    assert config["tie_weights"] is True
    assert all(torch.equal(tensor, whole[key]) for key, tensor in tensors.items())


def extra(case: Case) -> int:
    """Numbers that only ours has as parameters, less those that only theirs has."""
    if case.family == "bert":
        return BERT["hidden_size"]  # the padding row of the segment table
    if case.family == "bart":
        return VOCAB - 4 * BART["d_model"]  # the head's bias is a buffer of theirs; their unread position rows
    return 0
