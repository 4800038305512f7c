"""Which keys a query sees, in the form that fused attention takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tencentpretrain.layers.documents import DocumentBlocks, document_spans
from tencentpretrain.layers.dropout import is_fast

MaskKind = Literal["fully_visible", "causal", "causal_with_prefix"]

HIDDEN_SCORE = -10000.0
"""What the additive masks of residual attention put on a hidden key. It is finite because these masks accumulate."""


@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """A mask as `scaled_dot_product_attention` takes it.

    Shapes:
        mask: broadcasts to (B, N, Q, K); boolean (True = visible), or float added to the scaled scores, or None.
        is_causal: key j is visible to query i iff j <= i; then `mask` is None.
        documents: attention inside each document of packed rows, in blocks; then `mask` is None.
    """

    mask: Tensor | None = None
    is_causal: bool = False
    documents: DocumentBlocks | None = None


NO_MASK = AttentionMask()


def causal_visibility(length: int, device: torch.device, window: int | None = None) -> Tensor:
    """Returns (1, 1, S, S) boolean: key j <= query i, and among the last `window` keys where that is given."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    return visible[None, None]


def same_document(document_ids: Tensor) -> Tensor:
    """Returns (B, 1, S, S) boolean: query and key lie in one document, or both are padding."""
    return document_ids[:, None, :, None] == document_ids[:, None, None, :]


def document_mask(kind: MaskKind, document_ids: Tensor, window: int | None) -> AttentionMask:
    """Returns the mask inside documents as blocks, which spares all work between them."""
    spans = document_spans(document_ids)
    blocks = DocumentBlocks(spans=spans)
    if kind == "causal":
        visible = causal_visibility(blocks.longest, document_ids.device, window)[0, 0]
        bias = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
        blocks = DocumentBlocks(spans=spans, bias=bias)
    return AttentionMask(documents=blocks)


def visible_keys(
    kind: MaskKind,
    segment_ids: Tensor,
    has_padding: bool,
    window: int | None = None,
    document_ids: Tensor | None = None,
) -> Tensor | None:
    """Returns the boolean form of a mask rule, or None where every key is visible.

    A query whose keys are all hidden sees all of them: with the finite masks that published models were trained with,
    a constant shift of all scores cancels in the softmax.

    Shapes:
        segment_ids: (B, S), 0 at padding.
        document_ids: (B, S), 0 at padding, where rows hold several documents that do not see each other.
        result: (B, 1, 1, S), (1, 1, S, S) or (B, 1, S, S).
    """
    if document_ids is not None:
        visible = _visible(kind, segment_ids, window) & same_document(document_ids)
        return visible | ~visible.any(dim=-1, keepdim=True)
    if kind == "causal":
        return causal_visibility(segment_ids.size(1), segment_ids.device, window)
    if kind == "fully_visible" and not has_padding:
        return None
    visible = _visible(kind, segment_ids)
    return visible | ~visible.any(dim=-1, keepdim=True)


def _visible(kind: MaskKind, segment_ids: Tensor, window: int | None = None) -> Tensor:
    """Returns which keys a mask rule shows, and nothing else."""
    real = (segment_ids > 0)[:, None, None, :]
    if kind == "fully_visible":
        return real
    causal = causal_visibility(segment_ids.size(1), segment_ids.device, window)
    if kind == "causal":
        return causal
    return (segment_ids == 1)[:, None, None, :] | (real & causal)


def attention_mask(
    kind: MaskKind,
    segment_ids: Tensor,
    *,
    has_padding: bool = True,
    window: int | None = None,
    bias: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> AttentionMask:
    """Builds the mask of one forward pass, shared by all layers.

    Shapes:
        segment_ids: (B, S), 0 at padding.
        bias: broadcasts to (B, N, S, S); added to the scaled scores (T5, ALiBi).
        document_ids: (B, S), 0 at padding: attention stays inside each document.
    """
    if window is not None and window >= segment_ids.size(1):
        window = None
    if document_ids is not None:
        if bias is None and kind != "causal_with_prefix" and is_fast(document_ids):
            return document_mask(kind, document_ids, window)
        visible = visible_keys(kind, segment_ids, has_padding, window, document_ids)
        assert visible is not None
        return AttentionMask(mask=visible if bias is None else torch.where(visible, bias, float("-inf")))
    if kind == "causal" and bias is None and window is None:
        return AttentionMask(is_causal=True)
    visible = visible_keys(kind, segment_ids, has_padding, window)
    if bias is None or visible is None:
        return AttentionMask(mask=visible if bias is None else bias)
    return AttentionMask(mask=torch.where(visible, bias, float("-inf")))


def additive_mask(
    kind: MaskKind,
    segment_ids: Tensor,
    *,
    has_padding: bool = True,
    window: int | None = None,
    document_ids: Tensor | None = None,
) -> Tensor | None:
    """Returns the float32 mask that residual attention accumulates: 0 where visible, -10000 where hidden."""
    if kind == "fully_visible" and not has_padding and document_ids is None:
        return None
    visible = _visible(kind, segment_ids, window)
    if document_ids is not None:
        visible = visible & same_document(document_ids)
    return (~visible).float() * HIDDEN_SCORE
