"""The transformer encoder, also the body of decoder-only models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.encoders.base import Encoder
from tencentpretrain.layers.blocks import EncoderBlock, TapPoint
from tencentpretrain.layers.build import (
    block_norm,
    build_attention,
    build_feed_forward,
    build_rotary,
    required,
    score_scale,
)
from tencentpretrain.layers.documents import document_positions
from tencentpretrain.layers.masks import additive_mask, attention_mask
from tencentpretrain.layers.position_bias import AlibiBias, RelativePositionBias
from tencentpretrain.layers.rotary import RotaryTable, at_positions
from tencentpretrain.registry import ENCODERS


def build_block(config: ModelConfig) -> EncoderBlock:
    """Returns one block as the configuration describes it."""
    return EncoderBlock(
        build_attention(config),
        build_feed_forward(config),
        (block_norm(config), block_norm(config)),
        dropout=config.dropout,
        pre_norm=config.layernorm_positioning == "pre",
    )


@ENCODERS.register("transformer")
class TransformerEncoder(Encoder):
    """A stack of blocks (Vaswani et al. 2017, arXiv:1706.03762; ALBERT's sharing: arXiv:1909.11942, section 3.1).

    Mask, rotary table and position bias are computed once per forward pass and shared by all layers.
    `layer_number_scale` needs no code: dividing and multiplying scores by the layer's number leaves them unchanged.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_size = required(config.hidden_size, "hidden_size", "encoder 'transformer'")
        num_heads = required(config.num_heads, "heads_num", "encoder 'transformer'")
        self.num_layers = required(config.num_layers, "layers_num", "encoder 'transformer'")
        self.mask = config.mask
        self.window = config.sliding_window
        self.residual_attention = config.residual_attention
        self.linear: nn.Linear | None = None
        if config.factorized_embedding:
            emb_size = required(config.emb_size, "emb_size", "encoder 'transformer'")
            self.linear = nn.Linear(emb_size, hidden_size)
        self.transformer: nn.ModuleList | EncoderBlock
        if config.parameter_sharing:
            self.transformer = build_block(config)
        else:
            self.transformer = nn.ModuleList(build_block(config) for _ in range(self.num_layers))
        self.layer_norm = block_norm(config) if config.layernorm_positioning == "pre" else None
        self.rotary = build_rotary(config)
        self.relative_pos_emb: RelativePositionBias | None = None
        if config.relative_position_embedding:
            self.relative_pos_emb = RelativePositionBias(
                num_heads, bidirectional=True, num_buckets=config.num_relative_buckets
            )
        self.bias_scale = score_scale(config)
        self.alibi = AlibiBias(num_heads) if config.alibi_position_embedding else None
        self.layer = nn.ModuleList(TapPoint() for _ in range(self.num_layers))

    def forward(  # type: ignore[override]
        self, emb: Tensor, segment_ids: Tensor, has_padding: bool = True, document_ids: Tensor | None = None
    ) -> Tensor:
        hidden: Tensor = emb if self.linear is None else self.linear(emb)
        rotary = None if self.rotary is None else self.rotary(segment_ids.size(1), hidden.device)
        if rotary is not None and document_ids is not None:
            rotary = at_positions(rotary, document_positions(document_ids))
        bias = self._bias(segment_ids, has_padding)
        if self.residual_attention:
            additive = additive_mask(
                self.mask, segment_ids, has_padding=has_padding, window=self.window, document_ids=document_ids
            )
            return self._forward_residual(hidden, additive, bias, rotary)
        mask = attention_mask(
            self.mask, segment_ids, has_padding=has_padding, window=self.window, bias=bias, document_ids=document_ids
        )
        recompute = self.gradient_checkpointing and self.training
        for index, tap in enumerate(self.layer):
            block = self._block(index)
            if recompute:
                hidden = checkpoint(block, hidden, mask, rotary, use_reentrant=False)
            else:
                hidden = block(hidden, mask, rotary)
            hidden = tap(hidden)
        return hidden if self.layer_norm is None else self.layer_norm(hidden)

    def _forward_residual(
        self,
        hidden: Tensor,
        additive: Tensor | None,
        bias: Tensor | None,
        rotary: RotaryTable | None,
    ) -> Tensor:
        scores: Tensor | None = None
        recompute = self.gradient_checkpointing and self.training
        for index, tap in enumerate(self.layer):
            step = self._block(index).forward_residual
            if recompute:
                hidden, scores = checkpoint(step, hidden, scores, additive, bias, rotary, use_reentrant=False)
            else:
                hidden, scores = step(hidden, scores, additive, bias, rotary)
            hidden = tap(hidden)
        return hidden if self.layer_norm is None else self.layer_norm(hidden)

    def _block(self, index: int) -> EncoderBlock:
        if isinstance(self.transformer, nn.ModuleList):
            block = self.transformer[index]
            assert isinstance(block, EncoderBlock)
            return block
        return self.transformer

    def _bias(self, segment_ids: Tensor, has_padding: bool) -> Tensor | None:
        """Returns what is added to the scaled scores. T5's bias joins before the scaling, hence its factor."""
        length = segment_ids.size(1)
        bias: Tensor | None = None
        if self.relative_pos_emb is not None:
            bias = self.relative_pos_emb(length, length)
            if self.bias_scale != 1.0:
                bias = bias * self.bias_scale
        if self.alibi is not None:
            # Under a causal mask, padding on either side moves all indices alike, which the softmax does not see.
            slope_bias = self.alibi(segment_ids, has_padding=has_padding and self.mask != "causal")
            bias = slope_bias if bias is None else bias + slope_bias
        if bias is not None and torch.is_autocast_enabled(bias.device.type):
            bias = bias.to(torch.get_autocast_dtype(bias.device.type))
        return bias
