"""BART (Lewis et al. 2020, arXiv:1910.13461) as `transformers.BartForConditionalGeneration` stores it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tencentpretrain.checkpoint.family import Family, Settings
from tencentpretrain.checkpoint.hf_config import HuggingFaceConfig
from tencentpretrain.checkpoint.rules import DropRows, SqueezeRow
from tencentpretrain.registry import FAMILIES


def _config(hf_config: Settings, names: Collection[str]) -> dict[str, Any]:
    theirs = HuggingFaceConfig(hf_config, "bart")
    theirs.expect("scale_embedding", False, default=False)
    # mBART and models before 2020 share this model_type but place their norms otherwise.
    theirs.expect("normalize_before", False, default=False)
    theirs.expect("add_final_layer_norm", False, default=False)
    theirs.expect("normalize_embedding", True, default=True)
    theirs.expect("static_position_embeddings", False, default=False)
    heads, inner = theirs.need("encoder_attention_heads"), theirs.need("encoder_ffn_dim")
    theirs.expect("decoder_attention_heads", heads, default=heads)
    theirs.expect("decoder_ffn_dim", inner, default=inner)
    hidden_size = theirs.need("d_model")
    config = {
        "emb_size": hidden_size,
        "feedforward_size": inner,
        "hidden_size": hidden_size,
        "hidden_act": theirs.activation("activation_function", "gelu"),
        "heads_num": heads,
        "layers_num": theirs.need("encoder_layers"),
        "decoder_layers_num": theirs.need("decoder_layers"),
        "max_seq_length": theirs.get("max_position_embeddings", 1024),
        "dropout": theirs.get("dropout", 0.1),
        "data_processor": "bart",
        "embedding": ["word", "pos"],
        "tgt_embedding": ["word", "pos"],
        "share_embedding": True,
        "encoder": "transformer",
        "mask": "fully_visible",
        "layernorm_form": "standard",
        "layernorm_eps": 1e-5,
        "decoder": "transformer",
        "target": ["lm"],
        "has_lmtarget_bias": "final_logits_bias" in names,
        "tie_weights": theirs.get("tie_word_embeddings", True),
    }
    theirs.done()
    return config


BART = FAMILIES.register("bart")(
    Family(
        name="bart",
        model_class="BartForConditionalGeneration",
        config=_config,
        prefix="model.",
        words={
            "a": {
                "linear_layers.0": "q_proj",
                "linear_layers.1": "k_proj",
                "linear_layers.2": "v_proj",
                "final_linear": "out_proj",
            },
            "e": {"embedding": "encoder", "tgt_embedding": "decoder"},
            "s": {"encoder.transformer": "encoder", "decoder.transformer_decoder": "decoder"},
            "f": {"feed_forward.linear_1": "fc1", "feed_forward.linear_2": "fc2"},
        },
        renames={
            "{e}.word.embedding.weight": "model.{e}.embed_tokens.weight",
            "{e}.layer_norm.{n}": "model.{e}.layernorm_embedding.{n}",
            "{s}.{i}.self_attn.{a}.{p}": "model.{s}.layers.{i}.self_attn.{a}.{p}",
            "{s}.{i}.layer_norm_1.{n}": "model.{s}.layers.{i}.self_attn_layer_norm.{n}",
            "{s}.{i}.{f}.{p}": "model.{s}.layers.{i}.{f}.{p}",
            "encoder.transformer.{i}.layer_norm_2.{n}": "model.encoder.layers.{i}.final_layer_norm.{n}",
            "decoder.transformer_decoder.{i}.context_attn.{a}.{p}": "model.decoder.layers.{i}.encoder_attn.{a}.{p}",
            "decoder.transformer_decoder.{i}.layer_norm_2.{n}": "model.decoder.layers.{i}.encoder_attn_layer_norm.{n}",
            "decoder.transformer_decoder.{i}.layer_norm_3.{n}": "model.decoder.layers.{i}.final_layer_norm.{n}",
            "target.lm.output_layer.weight": "lm_head.weight",
        },
        rules=[
            # Their positions begin at row 2: the first two rows are left from a padding index.
            DropRows(("{e}.pos.embedding.weight",), "model.{e}.embed_positions.weight", first=2),
            SqueezeRow(("target.lm.output_layer.bias",), "final_logits_bias"),
        ],
        theirs_only=["model.encoder.version", "model.decoder.version"],
        shared=[("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")],
        tied={"lm_head.weight": "model.shared.weight"},
        optional=["target.lm.output_layer.bias"],
    )
)
