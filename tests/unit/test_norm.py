"""Norms and activations against published numbers, float64 formulas and torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tencentpretrain.layers.activations import ACTIVATIONS
from tencentpretrain.layers.norm import build_norm

KINDS = [("normal", "toolkit"), ("normal", "standard"), ("t5", "toolkit"), ("rms", "toolkit")]


def reference(kind: str, form: str, x: Tensor, norm: nn.Module, eps: float) -> Tensor:
    """The published formula in float64."""
    x = x.double()
    if kind == "normal":
        gamma, beta = norm.gamma.double(), norm.beta.double()
        centred = x - x.mean(-1, keepdim=True)
        if form == "toolkit":
            return gamma * centred / (x.std(-1, keepdim=True) + eps) + beta
        return gamma * centred / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt() + beta
    return norm.weight.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def randomized(kind: Any, form: Any, size: int, eps: float) -> nn.Module:
    norm = build_norm(kind, size, eps, form)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(1.0, 0.5)
    return norm


def test_published_vectors() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    toolkit = build_norm("normal", 4, 1e-6, "toolkit")(x)
    torch.testing.assert_close(toolkit, torch.tensor([-1.161894, -0.387298, 0.387298, 1.161894]), atol=2e-6, rtol=0)
    for kind in ("t5", "rms"):
        rms = build_norm(kind, 4, 1e-6, "toolkit")(x)  # type: ignore[arg-type]
        torch.testing.assert_close(rms, torch.tensor([0.365148, 0.730297, 1.095445, 1.460593]), atol=2e-6, rtol=0)


def test_standard_form_is_layer_norm() -> None:
    x = torch.randn(3, 5, 16)
    expected = torch.nn.functional.layer_norm(x, (16,), eps=1e-5)
    torch.testing.assert_close(build_norm("normal", 16, 1e-5, "standard")(x), expected)


def test_parameter_names() -> None:
    assert [name for name, _ in build_norm("normal", 4, 1e-6, "toolkit").named_parameters()] == ["gamma", "beta"]
    assert [name for name, _ in build_norm("normal", 4, 1e-6, "standard").named_parameters()] == ["gamma", "beta"]
    assert [name for name, _ in build_norm("rms", 4, 1e-6, "toolkit").named_parameters()] == ["weight"]
    assert [name for name, _ in build_norm("t5", 4, 1e-6, "toolkit").named_parameters()] == ["weight"]


@pytest.mark.parametrize(("kind", "form"), KINDS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_value_and_gradients_against_float64(kind: str, form: str, scale: float) -> None:
    torch.manual_seed(0)
    eps = 1e-6
    norm = randomized(kind, form, 48, eps)
    x = (torch.randn(2, 7, 48) * scale + 0.3 * scale).requires_grad_()
    weights = torch.randn(2, 7, 48)

    value = norm(x)
    leaves = [x, *norm.parameters()]
    gradients = torch.autograd.grad((value * weights).sum(), leaves)

    exact = reference(kind, form, x, norm, eps)
    exact_gradients = torch.autograd.grad((exact * weights.double()).sum(), leaves)

    torch.testing.assert_close(value.double(), exact, atol=1e-5, rtol=1e-5)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        bound = 2e-5 * exact_gradient.abs().max().item()
        torch.testing.assert_close(gradient, exact_gradient, atol=bound, rtol=1e-4)


@pytest.mark.parametrize(("kind", "form"), KINDS)
def test_half_precision_input_is_normed_in_float32(kind: str, form: str) -> None:
    torch.manual_seed(0)
    norm = randomized(kind, form, 256, 1e-6)
    x = (torch.randn(8, 256) + 20).bfloat16()
    value = norm(x)
    assert value.dtype == torch.bfloat16
    exact = reference(kind, form, x, norm, 1e-6)
    torch.testing.assert_close(value.double(), exact, atol=2e-2, rtol=2**-7)


@pytest.mark.parametrize(("kind", "form"), KINDS)
def test_constant_rows_stay_finite(kind: str, form: str) -> None:
    norm = build_norm(kind, 8, 1e-6, form)  # type: ignore[arg-type]
    x = torch.zeros(2, 8, requires_grad=True)
    value = norm(x)
    assert torch.equal(value, torch.zeros(2, 8))
    (gradient,) = torch.autograd.grad((value * torch.randn(2, 8)).sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gelu", "gelu_fast", "silu"])
def test_activation_gradients(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.linspace(-30, 30, 301), torch.randn(300_000) * 2]).to(dtype).requires_grad_()
    formulas = {
        "gelu": lambda z: z * torch.special.ndtr(z),
        "gelu_fast": lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
        "silu": lambda z: z * torch.sigmoid(z),
    }
    value, exact = ACTIVATIONS[name](x), formulas[name](x.double())
    bound = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-4, "rtol": 2**-8}
    torch.testing.assert_close(value.double(), exact, **bound)
    weights = torch.randn(x.shape).to(dtype)
    (gradient,) = torch.autograd.grad(value, x, weights)
    (expected,) = torch.autograd.grad(exact, x, weights.double())
    assert gradient.dtype == dtype
    bound = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2**-7}
    torch.testing.assert_close(gradient, expected, **bound)


def test_activation_of_strided_input() -> None:
    x = torch.randn(6, 5).t()
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(ACTIVATIONS["gelu_fast"](x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gelu", [-0.045500, -0.158655, -0.154269, 0, 0.345731, 0.841345, 1.954500]),
        ("gelu_fast", [-0.045402, -0.158808, -0.154286, 0, 0.345714, 0.841192, 1.954598]),
        ("silu", [-0.238406, -0.268941, -0.188770, 0, 0.311230, 0.731059, 1.761594]),
        ("relu", [0, 0, 0, 0, 0.5, 1, 2]),
        ("linear", [-2, -1, -0.5, 0, 0.5, 1, 2]),
    ],
)
def test_activations(name: str, expected: list[float]) -> None:
    value = ACTIVATIONS[name](torch.tensor([-2, -1, -0.5, 0, 0.5, 1, 2]))
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float32), atol=2e-6, rtol=0)
