"""Which keys a query sees, in the form that fused attention takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MaskKind = Literal["fully_visible", "causal", "causal_with_prefix"]

HIDDEN_SCORE = -10000.0
"""What the additive masks of residual attention put on a hidden key. It is finite because these masks accumulate."""


@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """A mask as `scaled_dot_product_attention` takes it.

    Shapes:
        mask: broadcasts to (B, N, Q, K); boolean (True = visible), or float added to the scaled scores, or None.
        is_causal: key j is visible to query i iff j <= i; then `mask` is None.
    """

    mask: Tensor | None = None
    is_causal: bool = False


NO_MASK = AttentionMask()


def causal_visibility(length: int, device: torch.device, window: int | None = None) -> Tensor:
    """Returns (1, 1, S, S) boolean: key j <= query i, and among the last `window` keys where that is given."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    return visible[None, None]


def visible_keys(kind: MaskKind, segment_ids: Tensor, has_padding: bool, window: int | None = None) -> Tensor | None:
    """Returns the boolean form of a mask rule, or None where every key is visible.

    A query whose keys are all hidden sees all of them: with the finite masks that published models were trained with,
    a constant shift of all scores cancels in the softmax.

    Shapes:
        segment_ids: (B, S), 0 at padding.
        result: (B, 1, 1, S), (1, 1, S, S) or (B, 1, S, S).
    """
    length = segment_ids.size(1)
    if kind == "causal":
        return causal_visibility(length, segment_ids.device, window)
    if kind == "fully_visible":
        if not has_padding:
            return None
        visible = (segment_ids > 0)[:, None, None, :]
    else:
        real = (segment_ids > 0)[:, None, None, :]
        prefix = (segment_ids == 1)[:, None, None, :]
        visible = prefix | (real & causal_visibility(length, segment_ids.device))
    return visible | ~visible.any(dim=-1, keepdim=True)


def attention_mask(
    kind: MaskKind,
    segment_ids: Tensor,
    *,
    has_padding: bool = True,
    window: int | None = None,
    bias: Tensor | None = None,
) -> AttentionMask:
    """Builds the mask of one forward pass, shared by all layers.

    Shapes:
        segment_ids: (B, S), 0 at padding.
        bias: broadcasts to (B, N, S, S); added to the scaled scores (T5, ALiBi).
    """
    if window is not None and window >= segment_ids.size(1):
        window = None
    if kind == "causal" and bias is None and window is None:
        return AttentionMask(is_causal=True)
    visible = visible_keys(kind, segment_ids, has_padding, window)
    if bias is None or visible is None:
        return AttentionMask(mask=visible if bias is None else bias)
    return AttentionMask(mask=torch.where(visible, bias, float("-inf")))


def additive_mask(
    kind: MaskKind, segment_ids: Tensor, *, has_padding: bool = True, window: int | None = None
) -> Tensor | None:
    """Returns the float32 mask that residual attention accumulates: 0 where visible, -10000 where hidden."""
    if kind == "causal":
        visible: Tensor | None = causal_visibility(segment_ids.size(1), segment_ids.device, window)
    elif kind == "fully_visible":
        visible = (segment_ids > 0)[:, None, None, :] if has_padding else None
    else:
        real, prefix = (segment_ids > 0)[:, None, None, :], (segment_ids == 1)[:, None, None, :]
        visible = prefix | (real & causal_visibility(segment_ids.size(1), segment_ids.device))
    return None if visible is None else (~visible).float() * HIDDEN_SCORE
