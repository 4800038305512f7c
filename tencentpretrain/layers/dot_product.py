"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, equation 1), by whichever kernel is fastest.

Torch's CPU kernel knows no dropout (it then computes in float32, step by step) and is slower on short sequences than
two batched products around a softmax, which is what stands here. Elsewhere `scaled_dot_product_attention` is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tencentpretrain.layers.dropout import draw_kept, is_fast, rate_used
from tencentpretrain.layers.norm import output_dtype

LONGEST_EXPLICIT = 1024
"""Above this many keys the score matrix is not kept unless dropout needs it."""


class _ExplicitAttention(torch.autograd.Function):
    """Keeps q, k, v and the probabilities. A dropped probability is kept with its sign bit set: no mask is stored."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, p: float, scale: float
    ) -> Tensor:
        batch, heads, length, _ = query.shape
        q, k, v = (x.reshape(batch * heads, x.size(2), x.size(3)) for x in (query, key, value))
        unused = q.new_empty(())
        scores = torch.baddbmm(unused, q, k.transpose(1, 2), beta=0, alpha=scale)
        if bias is not None:
            scores.view(batch, heads, length, -1).add_(bias)
        probabilities = torch.softmax(scores, dim=-1)  # in float32 inside, whatever the dtype
        kept_scale = 1.0
        if p > 0:
            kept_scale = 1 / (1 - rate_used(p))
            probabilities = mark_dropped(probabilities, draw_kept(probabilities.shape, p).bitwise_xor_(1))
        output = torch.baddbmm(
            unused, torch.relu(probabilities) if p > 0 else probabilities, v, beta=0, alpha=kept_scale
        )
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.scale, ctx.kept_scale, ctx.heads = scale, kept_scale, heads
        ctx.bias_shape = None if bias is None else bias.shape
        return output.view(batch, heads, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probabilities = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.size(2), gradient.size(3)).to(q.dtype)
        unused = q.new_empty(())
        kept = torch.relu(probabilities) if ctx.kept_scale != 1 else probabilities
        grad_v = torch.baddbmm(unused, kept.transpose(1, 2), g, beta=0, alpha=ctx.kept_scale)
        grad_scores = torch.baddbmm(unused, g, v.transpose(1, 2), beta=0, alpha=ctx.kept_scale)
        if ctx.kept_scale != 1:
            grad_scores = torch.ops.aten.threshold_backward(grad_scores, kept, 0)
            probabilities = probabilities.abs()
        grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, probabilities.dtype)
        grad_q = torch.baddbmm(unused, grad_scores, k, beta=0, alpha=ctx.scale)
        grad_k = torch.baddbmm(unused, grad_scores.transpose(1, 2), q, beta=0, alpha=ctx.scale)
        grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_bias = grad_scores.view(-1, ctx.heads, *grad_scores.shape[1:]).sum_to_size(ctx.bias_shape)

        def split(x: Tensor) -> Tensor:
            return x.view(-1, ctx.heads, x.size(1), x.size(2))

        return split(grad_q), split(grad_k), split(grad_v), grad_bias, None, None


def mark_dropped(probabilities: Tensor, dropped: Tensor) -> Tensor:
    """Sets the sign bit of the (non-negative) elements whose entry in `dropped` (int16, 0 or 1; overwritten) is 1."""
    if probabilities.dtype in (torch.bfloat16, torch.float16):
        sign = dropped.bitwise_left_shift_(15)
        return probabilities.view(torch.int16).bitwise_or_(sign).view(probabilities.dtype)
    return probabilities.mul_(dropped.mul_(-2).add_(1).to(probabilities.dtype))


def repeat_heads(heads: Tensor, num_heads: int) -> Tensor:
    """Returns key or value heads (B, Nkv, T, D), each repeated consecutively, to (B, N, T, D)."""
    return heads if heads.size(1) == num_heads else heads.repeat_interleave(num_heads // heads.size(1), dim=1)


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Returns softmax(scale * q k^T + mask) v.

    Shapes (B batch, N heads, S queries, T keys, D width):
        query: (B, N, S, D); key, value: (B, N, T, D), or (B, Nkv, T, D) with Nkv a divisor of N; result: (B, N, S, D).
        mask: broadcastable to (B, N, S, T): boolean, True where the key is visible (each query must see at least one),
            or a bias added to the scaled scores.
        is_causal: query i sees keys up to i; S and T must be equal; not together with `mask`.
        dropout: rate on the probabilities.
        scale: D^-0.5 if None.
    """
    dtype = output_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    # Of torch's kernels only those that take no mask know grouped heads; the others would fall back to the slow path.
    grouped = key.size(1) != query.size(1) and mask is None and query.is_cuda
    if not grouped:
        key, value = repeat_heads(key, query.size(1)), repeat_heads(value, query.size(1))
    if not is_fast(query) or dtype == torch.float64 or (key.size(2) > LONGEST_EXPLICIT and dropout == 0):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
    if is_causal:
        mask = torch.ones(query.size(2), key.size(2), dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
    if mask is not None and mask.dim() < 4:
        mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    mixed: Tensor = _ExplicitAttention.apply(query, key, value, mask, dropout, scale)
    return mixed
