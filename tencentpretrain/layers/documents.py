"""Several documents in one row: where each lies, positions inside it, and attention that computes nothing across them.

On the CPU each document's queries meet its own keys only: no score between documents is ever computed, so the work
falls with the square of the documents' lengths and not even an infinity in one document can reach another. Elsewhere,
and with position biases, a boolean mask hides the other documents (`layers/masks.py`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tencentpretrain.layers.dot_product import LONGEST_EXPLICIT, dot_product_attention, mark_dropped, repeat_heads
from tencentpretrain.layers.dropout import draw_kept, rate_used
from tencentpretrain.layers.norm import output_dtype

Span = tuple[int, int, int]
"""Row, first position, last position + 1."""


@dataclass(frozen=True, kw_only=True)
class DocumentBlocks:
    """Attention inside each document.

    Shapes (L the longest document):
        spans: the documents of all rows; positions outside of them are padding.
        bias: (L, L) float32, 0 where a query of a document sees a key of it and -inf elsewhere; None where it sees all.
    """

    spans: tuple[Span, ...]
    bias: Tensor | None = None

    @property
    def longest(self) -> int:
        """The length of the longest document."""
        return max((end - begin for _, begin, end in self.spans), default=0)


def document_spans(document_ids: Tensor) -> tuple[Span, ...]:
    """Returns where the documents lie.

    Shapes:
        document_ids: (B, S) int64 on the CPU, 0 at padding; neighbouring documents have different numbers.
    """
    spans: list[Span] = []
    width = document_ids.size(1)
    change = (document_ids[:, 1:] != document_ids[:, :-1]).numpy()
    first = document_ids.numpy()
    for row in range(len(document_ids)):
        edges = [0, *(change[row].nonzero()[0] + 1).tolist(), width]
        spans += [(row, begin, end) for begin, end in itertools.pairwise(edges) if first[row, begin] > 0]
    return tuple(spans)


def document_positions(document_ids: Tensor) -> Tensor:
    """Returns each token's position in its document, counted from 0: (B, S) int64; padding counts likewise.

    Shapes:
        document_ids: (B, S) int64.
    """
    index = torch.arange(document_ids.size(1), device=document_ids.device).expand_as(document_ids)
    begins = torch.zeros_like(index)
    begins[:, 1:] = torch.where(document_ids[:, 1:] != document_ids[:, :-1], index[:, 1:], 0)
    return index - begins.cummax(dim=1).values


class _BlockAttention(torch.autograd.Function):
    """Two products around a softmax per document, on slices of the row; keeps what explicit attention keeps.

    The result is laid out as (B, S, N, D), so that joining the heads copies nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: DocumentBlocks, p: float, scale: float
    ) -> Tensor:
        unused = query.new_empty(())
        bias = None if blocks.bias is None else blocks.bias.to(query.dtype)
        kept_scale = 1 / (1 - rate_used(p)) if p > 0 else 1.0
        output = _by_position(query)
        kept = []
        for row, begin, end in blocks.spans:
            q, k, v = (x[row, :, begin:end] for x in (query, key, value))
            scores = torch.baddbmm(unused, q, k.transpose(1, 2), beta=0, alpha=scale)
            if bias is not None:
                scores.add_(bias[: end - begin, : end - begin])
            probabilities = torch.softmax(scores, dim=-1)
            if p > 0:
                probabilities = mark_dropped(probabilities, draw_kept(probabilities.shape, p).bitwise_xor_(1))
            visible = torch.relu(probabilities) if p > 0 else probabilities
            output[row, :, begin:end] = torch.baddbmm(unused, visible, v, beta=0, alpha=kept_scale)
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.spans, ctx.scale, ctx.kept_scale = blocks.spans, scale, kept_scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        unused = query.new_empty(())
        gradient = gradient.to(query.dtype)
        grad_query, grad_key, grad_value = _by_position(query), _by_position(query), _by_position(query)
        for (row, begin, end), probabilities in zip(ctx.spans, kept, strict=True):
            q, k, v, g = (x[row, :, begin:end] for x in (query, key, value, gradient))
            visible = torch.relu(probabilities) if ctx.kept_scale != 1 else probabilities
            grad_value[row, :, begin:end] = torch.baddbmm(
                unused, visible.transpose(1, 2), g, beta=0, alpha=ctx.kept_scale
            )
            grad_scores = torch.baddbmm(unused, g, v.transpose(1, 2), beta=0, alpha=ctx.kept_scale)
            if ctx.kept_scale != 1:
                grad_scores = torch.ops.aten.threshold_backward(grad_scores, visible, 0)
                probabilities = probabilities.abs()
            grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, probabilities.dtype)
            grad_query[row, :, begin:end] = torch.baddbmm(unused, grad_scores, k, beta=0, alpha=ctx.scale)
            grad_key[row, :, begin:end] = torch.baddbmm(unused, grad_scores.transpose(1, 2), q, beta=0, alpha=ctx.scale)
        return grad_query, grad_key, grad_value, None, None, None


def _by_position(like: Tensor) -> Tensor:
    """Returns zeros of the shape (B, N, S, D), laid out as (B, S, N, D)."""
    batch, heads, length, width = like.shape
    return like.new_zeros(batch, length, heads, width).transpose(1, 2)


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: DocumentBlocks, *, dropout: float = 0.0, scale: float
) -> Tensor:
    """Returns attention inside each document, and zeros at padding; on the CPU.

    Shapes (B batch, N heads, S positions, D width):
        query: (B, N, S, D); key, value: (B, N, S, D), or (B, Nkv, S, D) with Nkv a divisor of N; result: (B, N, S, D).
    """
    dtype = output_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    key, value = repeat_heads(key, query.size(1)), repeat_heads(value, query.size(1))
    if dropout > 0 or blocks.longest <= LONGEST_EXPLICIT:
        mixed: Tensor = _BlockAttention.apply(query, key, value, blocks, dropout, scale)
        return mixed
    # Torch's kernel keeps no scores of long documents; its slices are joined in the order of the rows.
    rows = []
    for row in range(query.size(0)):
        pieces, reached = [], 0
        for begin, end in ((begin, end) for number, begin, end in blocks.spans if number == row):
            if begin > reached:
                pieces.append(torch.zeros_like(query[row : row + 1, :, reached:begin]))
            q, k, v = (x[row : row + 1, :, begin:end] for x in (query, key, value))
            bias = None if blocks.bias is None else blocks.bias[: end - begin, : end - begin]
            pieces.append(dot_product_attention(q, k, v, mask=bias, scale=scale))
            reached = end
        pieces.append(torch.zeros_like(query[row : row + 1, :, reached:]))
        rows.append(torch.cat(pieces, dim=2))
    return torch.cat(rows)
