"""How a sequence of hidden states becomes one vector."""

from __future__ import annotations

import torch
from torch import Tensor

from tencentpretrain.config.model import Pooling


def pool(hidden: Tensor, segment_ids: Tensor, kind: Pooling, weighting: str = "mask") -> Tensor:
    """Returns (B, H).

    With weighting "segment", `first`, `last` and `mean` weigh each position by its segment number, as models fine-tuned
    with published weights on text pairs expect. `max` is always taken over the real positions.

    Shapes:
        hidden: (B, S, H).
        segment_ids: (B, S), 0 at padding.
    """
    real = segment_ids > 0
    if kind == "max":
        return hidden.masked_fill(~real.unsqueeze(-1), torch.finfo(hidden.dtype).min).amax(dim=1)
    weight = (segment_ids if weighting == "segment" else real).to(hidden.dtype)
    if kind == "mean":
        total = torch.einsum("bs,bsh->bh", weight, hidden)
        return total / weight.sum(dim=1, keepdim=True).clamp(min=1)
    if kind == "first":
        first = hidden[:, 0]
        return first * weight[:, :1] if weighting == "segment" else first
    position = torch.arange(hidden.size(1), device=hidden.device)
    last = (position * real).amax(dim=1)
    row = torch.arange(hidden.size(0), device=hidden.device)
    vector = hidden[row, last]
    return vector * weight[row, last].unsqueeze(-1) if weighting == "segment" else vector
