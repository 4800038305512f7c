"""Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tencentpretrain.layers.documents import document_attention
from tencentpretrain.layers.dot_product import dot_product_attention, repeat_heads
from tencentpretrain.layers.dropout import dropout
from tencentpretrain.layers.masks import NO_MASK, AttentionMask
from tencentpretrain.layers.norm import build_norm
from tencentpretrain.layers.rotary import RotaryTable, rotate


class Attention(nn.Module):
    """Attention of queries to a memory, or of a sequence to itself.

    `linear_layers` are query, key and value. Key and value may have fewer heads; head h of the query then reads key
    head h * num_kv_heads // num_heads (grouped queries, Ainslie et al. 2023, arXiv:2305.13245, section 2.2).

    Args:
        hidden_size: width H of input and output.
        num_heads: query heads N.
        head_dim: width D per head; N * D may differ from H.
        num_kv_heads: key and value heads.
        bias: bias of the output projection.
        qkv_bias: bias of query, key and value.
        scale: factor on the scores.
        dropout: rate on the attention probabilities.
        qk_norm_eps: epsilon of an RMS norm over each query and key head; None for no norm.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int,
        num_kv_heads: int,
        bias: bool = True,
        qkv_bias: bool = True,
        scale: float,
        dropout: float = 0.0,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = scale
        self.dropout = dropout
        widths = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        self.linear_layers = nn.ModuleList(nn.Linear(hidden_size, width, bias=qkv_bias) for width in widths)
        self.final_linear = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if qk_norm_eps is not None:
            self.q_norm = build_norm("rms", head_dim, qk_norm_eps, "toolkit")
            self.k_norm = build_norm("rms", head_dim, qk_norm_eps, "toolkit")

    def project(self, hidden: Tensor, memory: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns query (B, N, Q, D), key and value (B, Nkv, K, D)."""
        query = self.linear_layers[0](hidden).unflatten(-1, (self.num_heads, self.head_dim))
        key = self.linear_layers[1](memory).unflatten(-1, (self.num_kv_heads, self.head_dim))
        value = self.linear_layers[2](memory).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return query, key, value

    def forward(
        self,
        hidden: Tensor,
        memory: Tensor | None = None,
        *,
        mask: AttentionMask = NO_MASK,
        rotary: RotaryTable | None = None,
    ) -> Tensor:
        """Returns (B, Q, H).

        Shapes:
            hidden: (B, Q, H), where queries come from.
            memory: (B, K, H), where keys and values come from; `hidden` itself if None.
        """
        query, key, value = self.project(hidden, hidden if memory is None else memory, rotary)
        rate = self.dropout if self.training else 0.0
        if mask.documents is not None:
            blocks = mask.documents
            return self._merge(document_attention(query, key, value, blocks, dropout=rate, scale=self.scale))
        mixed = dot_product_attention(
            query,
            key,
            value,
            mask=mask.mask,
            is_causal=mask.is_causal,
            dropout=rate,
            scale=self.scale,
        )
        return self._merge(mixed)

    def forward_residual(
        self,
        hidden: Tensor,
        previous: Tensor | None,
        *,
        additive: Tensor | None,
        bias: Tensor | None = None,
        rotary: RotaryTable | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention with scores added to those of the layer below (RealFormer, He et al. 2020, arXiv:2012.11747).

        The handed-on scores include the mask, so masks accumulate from layer to layer.

        Shapes:
            hidden: (B, S, H).
            previous: (B, N, S, S) float32 scores of the layer below; None in the first layer.
            additive: broadcasts to (B, N, S, S), 0 or -10000.
            bias: broadcasts to (B, N, S, S), added to the scaled scores.
            result: (B, S, H) and this layer's (B, N, S, S) scores.
        """
        query, key, value = self.project(hidden, hidden, rotary)
        key, value = repeat_heads(key, self.num_heads), repeat_heads(value, self.num_heads)
        scores = torch.matmul(query, key.transpose(-2, -1)).float() * self.scale
        for term in (bias, additive, previous):
            if term is not None:
                scores = scores + term
        weights = dropout(torch.softmax(scores, dim=-1), self.dropout, self.training).to(value.dtype)
        return self._merge(torch.matmul(weights, value)), scores

    def _merge(self, mixed: Tensor) -> Tensor:
        output: Tensor = self.final_linear(mixed.transpose(1, 2).flatten(2))
        return output
