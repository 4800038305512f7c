"""LLaMA 1, 2 and 3 (Touvron et al. 2023, arXiv:2302.13971, 2307.09288) as `transformers.LlamaForCausalLM` stores them.

Families that grew from it share its table and most of its config.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tencentpretrain.checkpoint.family import Family, Settings
from tencentpretrain.checkpoint.hf_config import HuggingFaceConfig
from tencentpretrain.checkpoint.rules import Interleave
from tencentpretrain.registry import FAMILIES


def decoder_only(theirs: HuggingFaceConfig) -> dict[str, Any]:
    """Returns the model JSON that LLaMA and its descendants have in common."""
    hidden_size, heads = theirs.need("hidden_size"), theirs.need("num_attention_heads")
    return {
        "emb_size": hidden_size,
        "feedforward_size": theirs.need("intermediate_size"),
        "hidden_size": hidden_size,
        "hidden_act": theirs.activation("hidden_act", "silu"),
        "heads_num": heads,
        "attention_head_size": theirs.get("head_dim", hidden_size // heads),
        "local_kv_heads_num": theirs.get("num_key_value_heads", heads),
        "layers_num": theirs.need("num_hidden_layers"),
        "max_seq_length": theirs.get("max_position_embeddings", 2048),
        "dropout": theirs.get("attention_dropout", 0.0),
        "data_processor": "lm",
        "embedding": ["word"],
        "remove_embedding_layernorm": True,
        "remove_transformer_bias": True,
        **theirs.rotary(),
        "encoder": "transformer",
        "feed_forward": "gated",
        "mask": "causal",
        "layernorm_positioning": "pre",
        "layernorm": "rms",
        "layernorm_eps": theirs.get("rms_norm_eps", 1e-6),
        "target": ["lm"],
        "tie_weights": theirs.get("tie_word_embeddings", False),
    }


def _config(hf_config: Settings, names: Collection[str]) -> dict[str, Any]:
    theirs = HuggingFaceConfig(hf_config, "llama")
    attention_bias = theirs.get("attention_bias", False)
    theirs.expect("mlp_bias", attention_bias, default=False)
    config = {**decoder_only(theirs), "remove_transformer_bias": not attention_bias}
    theirs.done()
    return config


LLAMA = FAMILIES.register("llama")(
    Family(
        name="llama",
        model_class="LlamaForCausalLM",
        config=_config,
        prefix="model.",
        words={"a": {"0": "q", "1": "k"}},
        renames={
            "embedding.word.embedding.weight": "model.embed_tokens.weight",
            "encoder.transformer.{i}.layer_norm_1.weight": "model.layers.{i}.input_layernorm.weight",
            "encoder.transformer.{i}.self_attn.linear_layers.2.{p}": "model.layers.{i}.self_attn.v_proj.{p}",
            "encoder.transformer.{i}.self_attn.final_linear.{p}": "model.layers.{i}.self_attn.o_proj.{p}",
            "encoder.transformer.{i}.layer_norm_2.weight": "model.layers.{i}.post_attention_layernorm.weight",
            "encoder.transformer.{i}.feed_forward.linear_gate.{p}": "model.layers.{i}.mlp.gate_proj.{p}",
            "encoder.transformer.{i}.feed_forward.linear_1.{p}": "model.layers.{i}.mlp.up_proj.{p}",
            "encoder.transformer.{i}.feed_forward.linear_2.{p}": "model.layers.{i}.mlp.down_proj.{p}",
            "encoder.layer_norm.weight": "model.norm.weight",
            "target.lm.output_layer.weight": "lm_head.weight",
        },
        rules=[
            Interleave(
                ("encoder.transformer.{i}.self_attn.linear_layers.{a}.{p}",), "model.layers.{i}.self_attn.{a}_proj.{p}"
            )
        ],
        theirs_only=["model.layers.{i}.self_attn.rotary_emb.inv_freq"],
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    )
)
