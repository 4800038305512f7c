"""Every shipped config of a family: each tensor has its place and shape in a model of `transformers`, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tencentpretrain.config import load_config
from tencentpretrain.model import build_model
from tencentpretrain.registry import FAMILIES

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

VOCAB = 61

# Pattern of shipped configs -> family, class and config class of theirs, their key -> our key.
LLAMA_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "feedforward_size",
    "num_attention_heads": "heads_num",
    "num_key_value_heads": "local_kv_heads_num",
    "num_hidden_layers": "layers_num",
    "head_dim": "attention_head_size",
    "max_position_embeddings": "max_seq_length",
    "tie_word_embeddings": "tie_weights",
}
T5_KEYS = {
    "d_model": "hidden_size",
    "d_ff": "feedforward_size",
    "d_kv": "attention_head_size",
    "num_heads": "heads_num",
    "num_layers": "layers_num",
    "num_decoder_layers": "decoder_layers_num",
}
SHIPPED: dict[str, tuple[str, str, str, Mapping[str, str], Mapping[str, Any]]] = {
    "bert/*": (
        "bert",
        "BertForPreTraining",
        "BertConfig",
        {
            "hidden_size": "hidden_size",
            "intermediate_size": "feedforward_size",
            "num_attention_heads": "heads_num",
            "num_hidden_layers": "layers_num",
            "max_position_embeddings": "max_seq_length",
        },
        {},
    ),
    "gpt2/*": (
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": "hidden_size",
            "n_inner": "feedforward_size",
            "n_head": "heads_num",
            "n_layer": "layers_num",
            "n_positions": "max_seq_length",
        },
        {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "t5/*": ("t5", "T5ForConditionalGeneration", "T5Config", T5_KEYS, {}),
    "t5-v1_1/*": (
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        T5_KEYS,
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart/*": (
        "bart",
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "d_model": "hidden_size",
            "encoder_ffn_dim": "feedforward_size",
            "decoder_ffn_dim": "feedforward_size",
            "encoder_attention_heads": "heads_num",
            "decoder_attention_heads": "heads_num",
            "encoder_layers": "layers_num",
            "decoder_layers": "decoder_layers_num",
            "max_position_embeddings": "max_seq_length",
        },
        {},
    ),
    "llama/*": ("llama", "LlamaForCausalLM", "LlamaConfig", LLAMA_KEYS, {}),
    "llama2/*": ("llama", "LlamaForCausalLM", "LlamaConfig", LLAMA_KEYS, {}),
    "llama3/*": ("llama", "LlamaForCausalLM", "LlamaConfig", LLAMA_KEYS, {}),
    "mistral/*": ("mistral", "MistralForCausalLM", "MistralConfig", LLAMA_KEYS, {}),
    "qwen2/*": ("qwen2", "Qwen2ForCausalLM", "Qwen2Config", LLAMA_KEYS, {}),
    "qwen3/*": ("qwen3", "Qwen3ForCausalLM", "Qwen3Config", LLAMA_KEYS, {}),
}
MODELS = Path(__file__).resolve().parents[2] / "models"


def their_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary settings of a model JSON as theirs."""
    if "rope_theta" not in values:
        return {}
    scaling = dict(values.get("rope_scaling", {"type": "default"}))
    if "original_max_seq_length" in scaling:
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_seq_length")
    theta = values["rope_theta"]
    return {"rope_parameters": {"rope_theta": theta, "rope_type": scaling.pop("type"), **scaling}}


@pytest.mark.parametrize("pattern", SHIPPED)
def test_shipped_configs_have_a_place_for_every_tensor(pattern: str) -> None:
    family_name, model_class, config_class, keys, settings = SHIPPED[pattern]
    family = FAMILIES.get(family_name)
    paths = sorted(MODELS.glob(f"{pattern}config.json"))
    assert paths
    for path in paths:
        # Two layers of full width: the others only repeat them.
        values = {**json.loads(path.read_text(encoding="utf-8")), "layers_num": 2}
        depth = {"num_layers": 2}
        if "decoder_layers_num" in values:
            values["decoder_layers_num"] = depth["num_decoder_layers"] = 2
        if "attention_head_size" in keys.values():
            values.setdefault("attention_head_size", values["hidden_size"] // values["heads_num"])
        values.setdefault("local_kv_heads_num", values["heads_num"])
        values.setdefault("tie_weights", False)
        sizes = {theirs: values[ours] for theirs, ours in keys.items()}
        hf_config = getattr(transformers, config_class)(vocab_size=VOCAB, **settings, **sizes, **their_rope(values))
        with torch.device("meta"):
            ours = build_model(load_config(path).model_copy(update=depth), VOCAB, initialize=False).state_dict()
            theirs = getattr(transformers, model_class)(hf_config).state_dict()
        back = family.to_theirs(values, ours)
        assert {key: back[key].shape for key in back} == {key: t.shape for key, t in theirs.items()}, path.name
        assert all(back[key].is_meta for key in back)
        config, tensors = family.to_ours(hf_config.to_dict(), theirs)
        assert {key: tensors[key].shape for key in tensors} == {key: t.shape for key, t in ours.items()}, path.name
        same = [key for key in values if key in config and key not in UNLIKE]
        assert {key: config[key] for key in same} == {key: values[key] for key in same}, path.name


UNLIKE = {
    "dropout",  # theirs has several rates
    "layernorm_eps",  # shipped files keep the toolkit's
    "tie_weights",  # newer configs call a T5 1.1 head tied unless a file holds it
    "max_seq_length",  # T5 has no table of positions
    "lm_scale",  # T5 1.0: shipped files keep the toolkit's arithmetic
}
