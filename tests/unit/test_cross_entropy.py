"""The chunked cross-entropy against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tencentpretrain.layers import cross_entropy
from tencentpretrain.layers.cross_entropy import cross_entropy_sum


@pytest.mark.parametrize("chunk", [400, 1 << 20])  # four rows at a time; torch's own kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, 50])
def test_same_as_torch(rows: int, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    torch.manual_seed(0)
    logits = (torch.randn(rows, 97) * 4).to(dtype).requires_grad_()
    before = logits.detach().clone()
    labels = torch.randint(0, 97, (rows,))
    labels[::3] = -100
    labels[1::4] = logits.argmax(-1)[1::4]
    total, correct = cross_entropy_sum(logits, labels)
    exact = F.cross_entropy(logits.double(), labels, reduction="sum")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), exact, atol=1e-5, rtol=1e-6)
    assert correct.item() == (logits.argmax(-1) == labels).sum().item()
    (gradient,) = torch.autograd.grad(total / 3, logits)
    (expected,) = torch.autograd.grad(exact / 3, logits)
    assert gradient.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(gradient, expected, atol=bound, rtol=1e-5 if dtype == torch.float32 else 2**-7)
    assert torch.equal(logits.detach(), before)


def test_improbable_labels_and_large_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 4)
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, 3e4, 3e4], [500.0, 0.0, 0.0]], requires_grad=True)
    total, correct = cross_entropy_sum(logits, torch.tensor([0, 2, 1]))
    torch.testing.assert_close(total, 500 + torch.tensor(2.0).log())
    assert correct.item() == 1  # of equal maxima the first is the prediction
    total.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[0, 0, 0], [0, 0.5, -0.5], [1, -1, 0]]))


def test_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 4)
    logits = torch.randn(6, 5)
    total, _ = cross_entropy_sum(logits, torch.arange(6).clamp(max=4))
    assert not total.requires_grad
