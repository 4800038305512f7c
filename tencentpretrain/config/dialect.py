"""Published spellings -> fields. The only place that knows the words of configs and command lines.

Inside the package there is one spelling (`num_heads`); JSON files and flags may use the published one (`heads_num`) or
the inside one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "feedforward_size": "feed_forward_size",
        "heads_num": "num_heads",
        "attention_head_size": "head_dim",
        "local_kv_heads_num": "num_kv_heads",
        "layers_num": "num_layers",
        "decoder_layers_num": "num_decoder_layers",
        "labels_num": "num_labels",
        "channels_num": "num_channels",
        "relative_attention_buckets_num": "num_relative_buckets",
        "remove_transformer_bias": "transformer_bias",
        "remove_attention_scale": "attention_scale",
        "remove_embedding_layernorm": "embedding_layernorm",
        "has_residual_attention": "residual_attention",
        "has_lmtarget_bias": "lm_bias",
        "factorized_embedding_parameterization": "factorized_embedding",
        "alibi": "alibi_position_embedding",
    }
)
"""Published key -> inside field, where they differ."""

INVERTED = frozenset({"remove_transformer_bias", "remove_attention_scale", "remove_embedding_layernorm"})
"""Published keys that say what is off; their fields say what is on."""

WITHOUT_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        # Published BLOOM configs hold it, and models trained with them never had a position bias.
        "alibi_position_embedding": 'has no effect, as ever; "alibi": true turns the ALiBi position bias on',
        "vocab_size": "has no effect: the size comes from the vocabulary",
    }
)
"""Keys that published files hold and nothing reads, with what a user should know about each."""

STREAMS = ("stream_0", "stream_1")

VALUES: Mapping[str, Mapping[Any, Any]] = MappingProxyType(
    {
        "mask": {"prefix": "causal_with_prefix"},
        "tokenizer": {"vqgan": "image", "multimodal": "text_image"},
        "do_lower_case": {"true": True, "false": False},
        "tgt_do_lower_case": {"true": True, "false": False},
    }
)
"""Field -> published value -> inside value."""

NESTED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"rope_scaling": {"rope_type": "type", "original_max_position_embeddings": "original_max_seq_length"}}
)
"""Keys inside an object-valued key."""

FOREIGN_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "num_hidden_layers": "layers_num",
        "num_attention_heads": "heads_num",
        "num_key_value_heads": "local_kv_heads_num",
        "intermediate_size": "feedforward_size",
        "max_position_embeddings": "max_seq_length",
        "hidden_dropout_prob": "dropout",
        "layer_norm_eps": "layernorm_eps",
        "rms_norm_eps": "layernorm_eps",
        "tie_word_embeddings": "tie_weights",
        "n_layer": "layers_num",
        "n_head": "heads_num",
        "n_embd": "emb_size",
        "lr": "learning_rate",
        "max_steps": "total_steps",
        "gradient_accumulation_steps": "accumulation_steps",
        "max_length": "seq_length",
    }
)
"""Words other projects use for a key; only ever suggested."""

_PUBLISHED = {field: key for key, field in FIELDS.items()}


def published(field: str) -> str:
    """Returns the published spelling of a field."""
    return _PUBLISHED.get(field, field)


def normalise(field: str, value: Any, *, many: bool) -> Any:
    """Returns a published value in its inside form: aliases replaced, a bare item for a list as a list."""
    if many and isinstance(value, (str, int)) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str):
        value = VALUES.get(field, {}).get(value, value)
    if isinstance(value, dict) and field in NESTED:
        value = {NESTED[field].get(key, key): item for key, item in value.items()}
    return value


def rewrite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Resolves published values that stand for more than one field.

    `"layernorm": "standard"` is the normal norm in torch's form (biased variance, epsilon inside the root).
    """
    result = dict(values)
    if result.get("layernorm") == "standard":
        result["layernorm"] = "normal"
        result.setdefault("layernorm_form", "standard")
    return result
