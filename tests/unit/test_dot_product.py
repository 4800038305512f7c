"""Explicit attention against torch's, with every kind of mask, and its dropout against an explicit mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tencentpretrain.layers.dot_product import dot_product_attention

BATCH, HEADS, QUERIES, KEYS, WIDTH = 3, 4, 10, 13, 8


def heads(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Strided as a model has it: a transposed view of (B, S, N, D)."""
    return torch.randn(BATCH, length, HEADS, WIDTH).to(dtype).transpose(1, 2).requires_grad_()


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    padding = torch.ones(BATCH, 1, 1, keys, dtype=torch.bool)
    padding[1, ..., 5:] = False
    square = torch.rand(BATCH, 1, queries, keys) < 0.6
    square[..., 0] = True
    return {
        "none": None,
        "padding": padding,
        "square": square,
        "two-dimensional": square[0, 0],
        "bias": torch.randn(1, HEADS, queries, keys).requires_grad_(),
    }


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("name", ["none", "padding", "square", "two-dimensional", "bias"])
def test_same_as_torch(name: str, scale: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = heads(QUERIES), heads(KEYS), heads(KEYS)
    mask = masks(QUERIES, KEYS)[name]
    weights = torch.randn(BATCH, HEADS, QUERIES, WIDTH)
    leaves = [query, key, value] + ([mask] if name == "bias" and mask is not None else [])

    ours = dot_product_attention(query, key, value, mask=mask, scale=scale)
    wide = None if mask is None else (mask if mask.dtype == torch.bool else mask.double())
    theirs = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=wide, scale=scale)

    torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=1e-5)
    expected = torch.autograd.grad((theirs * weights).sum(), leaves)
    for gradient, exact in zip(torch.autograd.grad((ours * weights).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(gradient, exact, atol=5e-6, rtol=1e-4)


def test_causal() -> None:
    torch.manual_seed(0)
    query, key, value = heads(QUERIES), heads(QUERIES), heads(QUERIES)
    ours = dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value, is_causal=True))


def test_bfloat16_stays_near_float64() -> None:
    torch.manual_seed(0)
    query, key, value = (heads(32, torch.bfloat16) for _ in range(3))
    ours = dot_product_attention(query, key, value)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, atol=3e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_a_scaled_mask_on_the_probabilities(dtype: torch.dtype) -> None:
    keys = WIDTH  # so that an identity as value makes the output the probabilities themselves
    query, key = heads(64, dtype), heads(keys, dtype)
    identity = torch.eye(keys, dtype=dtype).expand(BATCH, HEADS, keys, keys)
    plain = dot_product_attention(query, key, identity)
    torch.manual_seed(1)
    dropped = dot_product_attention(query, key, identity, dropout=0.25)
    kept = (dropped != 0).double()
    assert abs(kept.mean().item() - 0.75) < 0.03
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(dropped.double(), plain.double() * kept / 0.75, atol=tolerance, rtol=tolerance)

    value = heads(keys, dtype)
    weights = torch.randn(BATCH, HEADS, 64, WIDTH)
    torch.manual_seed(1)
    ours = dot_product_attention(query, key, value, dropout=0.25)
    scores = query.double() @ key.double().transpose(2, 3) * WIDTH**-0.5
    exact = (scores.softmax(-1) * kept / 0.75) @ value.double()
    leaves = [query, key, value]
    expected = torch.autograd.grad((exact * weights).sum(), leaves)
    tolerance = 1e-5 if dtype == torch.float32 else 6e-2
    for gradient, wanted in zip(torch.autograd.grad((ours * weights).sum(), leaves), expected, strict=True):
        assert gradient.dtype == dtype
        bound = tolerance * wanted.abs().max().item()
        torch.testing.assert_close(gradient.double(), wanted.double(), atol=bound, rtol=tolerance)


def test_recomputation_draws_the_same_mask() -> None:
    query, key, value = heads(16), heads(16), heads(16)

    def attend(query: Tensor) -> Tensor:
        return dot_product_attention(query, key, value, dropout=0.4)

    torch.manual_seed(2)
    (plain,) = torch.autograd.grad(attend(query).square().sum(), query)
    torch.manual_seed(2)
    (recomputed,) = torch.autograd.grad(checkpoint(attend, query, use_reentrant=False).square().sum(), query)
    assert torch.equal(plain, recomputed)
