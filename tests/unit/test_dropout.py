"""Dropout: rate, unbiasedness, reproducibility, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tencentpretrain.layers.dropout import Dropout, add_dropout, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    count = 400_000
    y = dropout(torch.ones(count, dtype=dtype), p, training=True).float()
    kept = (y != 0).float().mean().item()
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5 + 2**-16
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)), atol=1e-4, rtol=2**-8)


def test_no_neighbour_dependence() -> None:
    torch.manual_seed(2)
    kept = (dropout(torch.ones(1_000_000), 0.3, training=True) != 0).float() - 0.7
    for lag in (1, 2, 3, 4, 8, 64):
        correlation = (kept[lag:] * kept[:-lag]).mean().item() / 0.21
        assert abs(correlation) < 5e-3


def test_evaluation_and_zero_rate_change_nothing() -> None:
    x = torch.randn(5, 7)
    assert torch.equal(dropout(x, 0.5, training=False), x)
    assert torch.equal(dropout(x, 0.0, training=True), x)
    assert torch.equal(Dropout(0.5).eval()(x), x)


def test_gradient_is_the_mask() -> None:
    torch.manual_seed(3)
    x = torch.randn(33, 17).requires_grad_()
    y = dropout(x, 0.4, training=True)
    weights = torch.randn(33, 17)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(gradient, weights * (y / x).detach())


def test_add_dropout_gradients() -> None:
    torch.manual_seed(4)
    residual, x = torch.randn(9, 11).requires_grad_(), torch.randn(9, 11).requires_grad_()
    y = add_dropout(residual, x, 0.25, training=True)
    weights = torch.randn(9, 11)
    gradient_residual, gradient_x = torch.autograd.grad((y * weights).sum(), (residual, x))
    scale = ((y - residual) / x).detach()
    torch.testing.assert_close(gradient_residual, weights)
    torch.testing.assert_close(gradient_x, weights * scale, atol=1e-5, rtol=1e-5)
    assert torch.equal(add_dropout(residual, x, 0.25, training=False), residual + x)


def test_reproducible_from_the_generator() -> None:
    x = torch.ones(1001)
    torch.manual_seed(5)
    first = dropout(x, 0.5, training=True)
    second = dropout(x, 0.5, training=True)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, 0.5, training=True), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("threads", [1, 2])
def test_same_draw_for_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    x = torch.ones(300_000)
    try:
        torch.set_num_threads(threads)
        torch.manual_seed(6)
        y = dropout(x, 0.1, training=True)
        torch.set_num_threads(1)
        torch.manual_seed(6)
        assert torch.equal(dropout(x, 0.1, training=True), y)
    finally:
        torch.set_num_threads(before)


def test_recomputation_draws_the_same_mask() -> None:
    def layer(x: Tensor) -> Tensor:
        return add_dropout(x, torch.tanh(dropout(x, 0.3, training=True)), 0.3, training=True)

    x = torch.randn(64, 32).requires_grad_()
    torch.manual_seed(7)
    (plain,) = torch.autograd.grad(layer(x).sum(), x)
    torch.manual_seed(7)
    (recomputed,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)
    assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_impossible_rates_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        Dropout(p)
