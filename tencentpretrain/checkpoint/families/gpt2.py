"""GPT-2 (Radford et al. 2019) as `transformers.GPT2LMHeadModel` stores it: matrices input-first, q, k and v in one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tencentpretrain.checkpoint.family import Family, Settings
from tencentpretrain.checkpoint.hf_config import HuggingFaceConfig
from tencentpretrain.checkpoint.rules import Chunk, Transpose
from tencentpretrain.registry import FAMILIES


def _config(hf_config: Settings, names: Collection[str]) -> dict[str, Any]:
    theirs = HuggingFaceConfig(hf_config, "gpt2")
    theirs.expect("scale_attn_by_inverse_layer_idx", False, default=False)
    theirs.expect("add_cross_attention", False, default=False)
    hidden_size = theirs.need("n_embd")
    config = {
        "emb_size": hidden_size,
        "feedforward_size": theirs.get("n_inner", 4 * hidden_size),
        "hidden_size": hidden_size,
        "hidden_act": theirs.activation("activation_function", "gelu_new"),
        "heads_num": theirs.need("n_head"),
        "layers_num": theirs.need("n_layer"),
        "max_seq_length": theirs.get("n_positions", theirs.get("n_ctx", 1024)),
        "dropout": theirs.get("resid_pdrop", 0.1),
        "data_processor": "lm",
        "embedding": ["word", "pos"],
        "remove_embedding_layernorm": True,
        "remove_attention_scale": not theirs.get("scale_attn_weights", True),
        "encoder": "transformer",
        "mask": "causal",
        "layernorm_positioning": "pre",
        "layernorm_form": "standard",
        "layernorm_eps": theirs.get("layer_norm_epsilon", 1e-5),
        "target": ["lm"],
        "tie_weights": theirs.get("tie_word_embeddings", True),
    }
    theirs.done()
    return config


_QKV = tuple(f"encoder.transformer.{{i}}.self_attn.linear_layers.{part}" for part in range(3))

GPT2 = FAMILIES.register("gpt2")(
    Family(
        name="gpt2",
        model_class="GPT2LMHeadModel",
        config=_config,
        prefix="transformer.",
        renames={
            "embedding.word.embedding.weight": "transformer.wte.weight",
            "embedding.pos.embedding.weight": "transformer.wpe.weight",
            "encoder.transformer.{i}.layer_norm_1.{n}": "transformer.h.{i}.ln_1.{n}",
            "encoder.transformer.{i}.self_attn.final_linear.bias": "transformer.h.{i}.attn.c_proj.bias",
            "encoder.transformer.{i}.layer_norm_2.{n}": "transformer.h.{i}.ln_2.{n}",
            "encoder.transformer.{i}.feed_forward.linear_1.bias": "transformer.h.{i}.mlp.c_fc.bias",
            "encoder.transformer.{i}.feed_forward.linear_2.bias": "transformer.h.{i}.mlp.c_proj.bias",
            "encoder.layer_norm.{n}": "transformer.ln_f.{n}",
            "target.lm.output_layer.weight": "lm_head.weight",
        },
        rules=[
            Transpose(tuple(f"{name}.weight" for name in _QKV), "transformer.h.{i}.attn.c_attn.weight"),
            Chunk(tuple(f"{name}.bias" for name in _QKV), "transformer.h.{i}.attn.c_attn.bias"),
            Transpose(
                ("encoder.transformer.{i}.self_attn.final_linear.weight",), "transformer.h.{i}.attn.c_proj.weight"
            ),
            Transpose(("encoder.transformer.{i}.feed_forward.linear_1.weight",), "transformer.h.{i}.mlp.c_fc.weight"),
            Transpose(("encoder.transformer.{i}.feed_forward.linear_2.weight",), "transformer.h.{i}.mlp.c_proj.weight"),
        ],
        theirs_only=["transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"],
        tied={"lm_head.weight": "transformer.wte.weight"},
    )
)
