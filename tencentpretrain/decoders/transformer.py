"""The transformer decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.layers.blocks import DecoderBlock, TapPoint
from tencentpretrain.layers.build import (
    PLAIN_EPS,
    block_norm,
    build_attention,
    build_feed_forward,
    plain_norm,
    required,
    score_scale,
)
from tencentpretrain.layers.masks import attention_mask
from tencentpretrain.layers.norm import build_norm
from tencentpretrain.layers.position_bias import RelativePositionBias
from tencentpretrain.registry import DECODERS


def final_norm(config: ModelConfig) -> nn.Module:
    """Returns the norm after the last block.

    Published models have a normal one with eps 1e-6 there unless `layernorm` is t5.
    """
    hidden_size = required(config.hidden_size, "hidden_size", "decoder 'transformer'")
    if config.decoder_final_norm == "configured":
        return block_norm(config)
    if config.layernorm == "t5":
        eps = PLAIN_EPS if config.layernorm_form == "toolkit" else config.layernorm_eps
        return build_norm("t5", hidden_size, eps, config.layernorm_form)
    return plain_norm(config, hidden_size)


@DECODERS.register("transformer")
class TransformerDecoder(nn.Module):
    """A stack of blocks that attend to themselves causally and to the encoder's output.

    Attributes:
        gradient_checkpointing: recompute blocks in the backward pass instead of keeping their activations.
    """

    gradient_checkpointing: bool = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num_layers = required(config.num_decoder_layers, "decoder_layers_num", "decoder 'transformer'")
        self.transformer_decoder = nn.ModuleList(
            DecoderBlock(
                build_attention(config),
                build_attention(config),
                build_feed_forward(config),
                (block_norm(config), block_norm(config), block_norm(config)),
                dropout=config.dropout,
                pre_norm=config.layernorm_positioning == "pre",
            )
            for _ in range(num_layers)
        )
        self.layer_norm = final_norm(config) if config.layernorm_positioning == "pre" else None
        self.self_pos_emb: RelativePositionBias | None = None
        if config.relative_position_embedding:
            num_heads = required(config.num_heads, "heads_num", "decoder 'transformer'")
            self.self_pos_emb = RelativePositionBias(
                num_heads, bidirectional=False, num_buckets=config.num_relative_buckets
            )
        self.bias_scale = score_scale(config)
        self.layer = nn.ModuleList(TapPoint() for _ in range(num_layers))

    def forward(
        self, memory: Tensor, emb: Tensor, memory_segment_ids: Tensor, memory_has_padding: bool = True
    ) -> Tensor:
        """Returns (B, T, H).

        Shapes:
            memory: (B, S, H), the encoder's output.
            emb: (B, T, H), the embedded target.
            memory_segment_ids: (B, S), 0 at padding.
            memory_has_padding: False promises that no position of the memory is padding.
        """
        hidden = emb
        length = emb.size(1)
        bias: Tensor | None = None
        if self.self_pos_emb is not None:
            bias = self.self_pos_emb(length, length) * self.bias_scale
            if torch.is_autocast_enabled(bias.device.type):
                bias = bias.to(torch.get_autocast_dtype(bias.device.type))
        # A causal mask reads no segment but the shape.
        mask = attention_mask("causal", emb[..., 0], bias=bias)
        memory_mask = attention_mask("fully_visible", memory_segment_ids, has_padding=memory_has_padding)
        recompute = self.gradient_checkpointing and self.training
        for block, tap in zip(self.transformer_decoder, self.layer, strict=True):
            if recompute:
                hidden = checkpoint(block, hidden, memory, mask, memory_mask, use_reentrant=False)
            else:
                hidden = block(hidden, memory, mask, memory_mask)
            hidden = tap(hidden)
        return hidden if self.layer_norm is None else self.layer_norm(hidden)
