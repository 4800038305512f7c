"""Biases that positions add to attention scores: T5's buckets and ALiBi."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_DISTANCE = 128


def relative_bucket(
    distance: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int = MAX_DISTANCE
) -> Tensor:
    """Maps key index - query index to a bucket (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    Shapes:
        distance: any, int64; the result has its shape.
    """
    bucket = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket = (distance > 0).long() * num_buckets
        steps = distance.abs()
    else:
        steps = (-distance).clamp(min=0)
    exact = num_buckets // 2
    # The order of these float32 operations decides which side of a bucket's edge a distance falls on.
    far = torch.log(steps.float().clamp(min=1) / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    far_bucket = (exact + far.long()).clamp(max=num_buckets - 1)
    return bucket + torch.where(steps < exact, steps, far_bucket)


class RelativePositionBias(nn.Module):
    """T5's learned bias per head and bucket of the distance between query and key (arXiv:1910.10683, section 2.1)."""

    def __init__(self, num_heads: int, *, bidirectional: bool, num_buckets: int = 32) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.num_buckets = num_buckets
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)

    def forward(self, query_length: int, key_length: int, *, start: int = 0) -> Tensor:
        """Returns (1, N, Q, K) for queries at positions start ... start + Q - 1 and keys at 0 ... K - 1."""
        device = self.relative_attention_bias.weight.device
        query = torch.arange(start, start + query_length, device=device)
        distance = torch.arange(key_length, device=device)[None, :] - query[:, None]
        # Each distance is looked up once; the (Q, K) square is a gather from that short row.
        low = 1 - start - query_length
        row = torch.arange(low, key_length, device=device)
        buckets = relative_bucket(row, bidirectional=self.bidirectional, num_buckets=self.num_buckets)
        by_distance: Tensor = self.relative_attention_bias(buckets).t()
        return by_distance[:, distance - low].unsqueeze(0)


def alibi_slopes(num_heads: int) -> Tensor:
    """Returns (N,) float32 slopes (Press et al. 2021, arXiv:2108.12409, section 3)."""
    largest = 2 ** int(math.log2(num_heads))
    base = 2.0 ** -(2.0 ** -(math.log2(largest) - 3))
    slopes = [base**power for power in range(1, largest + 1)]
    if largest < num_heads:
        base = 2.0 ** -(2.0 ** -(math.log2(2 * largest) - 3))
        slopes += [base**power for power in range(1, 2 * (num_heads - largest), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


def alibi_index(segment_ids: Tensor, *, has_padding: bool = True) -> Tensor:
    """Returns each key's index among the real positions: (B, S), or (1, S) without padding; 0 at padding.

    Shapes:
        segment_ids: (B, S), 0 at padding.
    """
    if not has_padding:
        return torch.arange(segment_ids.size(1), device=segment_ids.device)[None]
    real = (segment_ids > 0).long()
    return (real.cumsum(dim=1) - 1) * real


class AlibiBias:
    """ALiBi's slope per head times the distance from query to key (arXiv:2108.12409, equation 1).

    The key's index alone would do, because the softmax does not see what is constant over keys; but the distance is
    small where it matters, so it survives a low-precision format. Slopes are neither saved nor cast with the weights.
    """

    def __init__(self, num_heads: int) -> None:
        self.slopes = alibi_slopes(num_heads)

    def __call__(self, segment_ids: Tensor, *, has_padding: bool = True) -> Tensor:
        """Returns (B, N, S, S), or (1, N, S, S) without padding, added to the scaled scores."""
        if self.slopes.device != segment_ids.device:
            self.slopes = self.slopes.to(segment_ids.device)
        index = alibi_index(segment_ids, has_padding=has_padding)
        distance = index[:, None, None, :] - index[:, None, :, None]
        return self.slopes[None, :, None, None] * distance
