"""T5 1.0 and 1.1 (Raffel et al. 2020, arXiv:1910.10683) as `transformers.T5ForConditionalGeneration` stores them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tencentpretrain.checkpoint.family import Choice, Family, Settings
from tencentpretrain.checkpoint.hf_config import HuggingFaceConfig
from tencentpretrain.registry import FAMILIES


def _config(hf_config: Settings, names: Collection[str]) -> dict[str, Any]:
    theirs = HuggingFaceConfig(hf_config, "t5")
    theirs.expect("relative_attention_max_distance", 128, default=128)
    gate, _, activation = str(theirs.get("feed_forward_proj", "relu")).rpartition("-")
    if gate not in ("", "gated"):
        theirs.problems.append(f"feed_forward_proj   is {gate}-{activation}; known: an activation, or gated-activation")
    # 'gated-gelu' names the tanh formula: the first 1.1 models were published with that word.
    activation = {"gated-gelu": "gelu_new"}.get(f"{gate}-{activation}", activation)
    # Newer configs keep the scale apart from the tying, and say "tied" of 1.1 models too, whose file has a head.
    tied = theirs.get("tie_word_embeddings", True)
    hidden_size = theirs.need("d_model")
    layers = theirs.need("num_layers")
    config = {
        "emb_size": hidden_size,
        "feedforward_size": theirs.need("d_ff"),
        "hidden_size": hidden_size,
        "hidden_act": theirs.translate("feed_forward_proj", activation),
        "heads_num": theirs.need("num_heads"),
        "attention_head_size": theirs.need("d_kv"),
        "layers_num": layers,
        "decoder_layers_num": theirs.get("num_decoder_layers", layers),
        "max_seq_length": theirs.get("n_positions", 512),
        "dropout": theirs.get("dropout_rate", 0.1),
        "data_processor": "t5",
        "embedding": ["word"],
        "tgt_embedding": ["word"],
        "relative_position_embedding": True,
        "relative_attention_buckets_num": theirs.get("relative_attention_num_buckets", 32),
        "remove_embedding_layernorm": True,
        "share_embedding": True,
        "encoder": "transformer",
        "mask": "fully_visible",
        "layernorm_positioning": "pre",
        "layernorm": "t5",
        "layernorm_eps": theirs.get("layer_norm_epsilon", 1e-6),
        "decoder_final_norm": "configured",
        "remove_attention_scale": True,
        "remove_transformer_bias": True,
        "feed_forward": "gated" if gate else "dense",
        "decoder": "transformer",
        "target": ["lm"],
        "tie_weights": tied,
        "lm_scale": theirs.get("scale_decoder_outputs", tied),
    }
    theirs.done()
    return config


T5 = FAMILIES.register("t5", "mt5")(
    Family(
        name="t5",
        model_class="T5ForConditionalGeneration",
        config=_config,
        words={
            "a": {"linear_layers.0": "q", "linear_layers.1": "k", "linear_layers.2": "v", "final_linear": "o"},
            "s": {"encoder.transformer": "encoder", "decoder.transformer_decoder": "decoder"},
            "c": {"encoder": "encoder", "decoder": "decoder"},
        },
        renames={
            "embedding.word.embedding.weight": "encoder.embed_tokens.weight",
            "tgt_embedding.word.embedding.weight": "decoder.embed_tokens.weight",
            "encoder.relative_pos_emb.relative_attention_bias.weight": (
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            ),
            "decoder.self_pos_emb.relative_attention_bias.weight": (
                "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            ),
            "{s}.{i}.self_attn.{a}.weight": "{s}.block.{i}.layer.0.SelfAttention.{a}.weight",
            "{s}.{i}.layer_norm_1.weight": "{s}.block.{i}.layer.0.layer_norm.weight",
            "encoder.transformer.{i}.feed_forward.linear_2.weight": (
                "encoder.block.{i}.layer.1.DenseReluDense.wo.weight"
            ),
            "encoder.transformer.{i}.layer_norm_2.weight": "encoder.block.{i}.layer.1.layer_norm.weight",
            "decoder.transformer_decoder.{i}.context_attn.{a}.weight": (
                "decoder.block.{i}.layer.1.EncDecAttention.{a}.weight"
            ),
            "decoder.transformer_decoder.{i}.layer_norm_2.weight": "decoder.block.{i}.layer.1.layer_norm.weight",
            "decoder.transformer_decoder.{i}.feed_forward.linear_2.weight": (
                "decoder.block.{i}.layer.2.DenseReluDense.wo.weight"
            ),
            "decoder.transformer_decoder.{i}.layer_norm_3.weight": "decoder.block.{i}.layer.2.layer_norm.weight",
            "{c}.layer_norm.weight": "{c}.final_layer_norm.weight",
            "target.lm.output_layer.weight": "lm_head.weight",
        },
        choices=[
            Choice(
                "feed_forward",
                "dense",
                {
                    "encoder.transformer.{i}.feed_forward.linear_1.weight": (
                        "encoder.block.{i}.layer.1.DenseReluDense.wi.weight"
                    ),
                    "decoder.transformer_decoder.{i}.feed_forward.linear_1.weight": (
                        "decoder.block.{i}.layer.2.DenseReluDense.wi.weight"
                    ),
                },
            ),
            Choice(
                "feed_forward",
                "gated",
                {
                    "encoder.transformer.{i}.feed_forward.linear_gate.weight": (
                        "encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight"
                    ),
                    "encoder.transformer.{i}.feed_forward.linear_1.weight": (
                        "encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight"
                    ),
                    "decoder.transformer_decoder.{i}.feed_forward.linear_gate.weight": (
                        "decoder.block.{i}.layer.2.DenseReluDense.wi_0.weight"
                    ),
                    "decoder.transformer_decoder.{i}.feed_forward.linear_1.weight": (
                        "decoder.block.{i}.layer.2.DenseReluDense.wi_1.weight"
                    ),
                },
            ),
        ],
        # Older files hold a bias table of the cross-attention, which no model reads.
        theirs_only=["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"],
        shared=[("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")],
        tied={"lm_head.weight": "shared.weight"},
    )
)
