"""The chunked cross-entropy against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tencentpretrain.layers import cross_entropy
from tencentpretrain.layers.cross_entropy import cross_entropy_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, 50])
def test_same_as_torch(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 400)  # four rows at a time
    torch.manual_seed(0)
    logits = (torch.randn(rows, 97) * 4).to(dtype).requires_grad_()
    labels = torch.randint(0, 97, (rows,))
    ours = cross_entropy_sum(logits, labels)
    exact = F.cross_entropy(logits.double(), labels, reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-6)
    (gradient,) = torch.autograd.grad(ours / 3, logits)
    (expected,) = torch.autograd.grad(exact / 3, logits)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 2**-7)


def test_large_logits_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 4)
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, 3e4, 3e4]], requires_grad=True)
    loss = cross_entropy_sum(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(loss, torch.tensor(2.0).log())
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[0, 0, 0], [0, -0.5, 0.5]]))
