"""From the model's configuration to built layers. The layers themselves take plain arguments."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.errors import ConfigError
from tencentpretrain.layers.attention import Attention
from tencentpretrain.layers.feed_forward import FeedForward, GatedFeedForward
from tencentpretrain.layers.norm import build_norm
from tencentpretrain.layers.rotary import RotaryPositions

T = TypeVar("T")

PLAIN_EPS = 1e-6
"""Epsilon of the toolkit's norms outside transformer blocks, whatever `layernorm_eps` says."""


def required(value: T | None, key: str, part: str) -> T:
    """Returns `value`.

    Raises:
        ConfigError: it is None; `key` is the published key and `part` what needs it.
    """
    if value is None:
        raise ConfigError(f"{key} is not set, but {part} needs it; add it to the model's config file")
    return value


def plain_norm(config: ModelConfig, size: int) -> nn.Module:
    """Returns the norm of embeddings and of the mlm head: always a normal norm."""
    eps = PLAIN_EPS if config.layernorm_form == "toolkit" else config.layernorm_eps
    return build_norm("normal", size, eps, config.layernorm_form)


def block_norm(config: ModelConfig) -> nn.Module:
    """Returns a norm as transformer blocks and the encoder's end use it."""
    size = required(config.hidden_size, "hidden_size", "a norm")
    return build_norm(config.layernorm, size, config.layernorm_eps, config.layernorm_form)


def head_width(config: ModelConfig) -> int:
    """Returns the width D of one head."""
    if config.head_dim is not None:
        return config.head_dim
    hidden_size = required(config.hidden_size, "hidden_size", "attention")
    num_heads = required(config.num_heads, "heads_num", "attention")
    if hidden_size % num_heads:
        raise ConfigError(
            f"hidden_size {hidden_size} is not a multiple of heads_num {num_heads}; change one of them "
            "or set attention_head_size"
        )
    return hidden_size // num_heads


def score_scale(config: ModelConfig) -> float:
    """Returns the factor on attention scores."""
    return head_width(config) ** -0.5 if config.attention_scale else 1.0


def build_attention(config: ModelConfig) -> Attention:
    """Returns one attention.

    Raises:
        ConfigError: a size is missing or sizes do not divide each other.
    """
    num_heads = required(config.num_heads, "heads_num", "attention")
    num_kv_heads = config.num_kv_heads or num_heads
    if num_heads % num_kv_heads:
        raise ConfigError(f"local_kv_heads_num {num_kv_heads} does not divide heads_num {num_heads}")
    return Attention(
        required(config.hidden_size, "hidden_size", "attention"),
        num_heads,
        head_dim=head_width(config),
        num_kv_heads=num_kv_heads,
        bias=config.transformer_bias,
        qkv_bias=config.transformer_bias if config.qkv_bias is None else config.qkv_bias,
        scale=score_scale(config),
        dropout=config.dropout,
        qk_norm_eps=config.layernorm_eps if config.qk_norm else None,
    )


def build_feed_forward(config: ModelConfig) -> nn.Module:
    """Returns one feed-forward layer."""
    layer = GatedFeedForward if config.feed_forward == "gated" else FeedForward
    return layer(
        required(config.hidden_size, "hidden_size", "the feed-forward layer"),
        required(config.feed_forward_size, "feedforward_size", "the feed-forward layer"),
        required(config.hidden_act, "hidden_act", "the feed-forward layer"),
        bias=config.transformer_bias,
    )


def build_rotary(config: ModelConfig) -> RotaryPositions | None:
    """Returns rotary positions, or None where the model has none (the T5 bias excludes them)."""
    if not config.rotary_position_embedding or config.relative_position_embedding:
        return None
    head_dim = head_width(config)
    if head_dim % 2:
        raise ConfigError(f"rotary_position_embedding needs an even head width, but it is {head_dim}")
    width = head_dim
    if config.rope_width == "hidden":
        hidden_size = required(config.hidden_size, "hidden_size", "rotary positions")
        width = hidden_size // required(config.num_heads, "heads_num", "rotary positions")
    return RotaryPositions(
        head_dim,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
        width=width,
        max_length=config.max_seq_length,
    )
