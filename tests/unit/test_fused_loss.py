"""The loss that projects onto the vocabulary a few rows at a time, against the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import IGNORE_LABEL, Batch
from tencentpretrain.layers import cross_entropy
from tencentpretrain.layers.cross_entropy import cross_entropy_sum, linear_cross_entropy_sum
from tencentpretrain.model import Model, build_model
from tencentpretrain.taps import Taps

VOCAB, WIDTH = 301, 24


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PROJECTED", 5 * VOCAB)  # five rows at a time
    monkeypatch.setattr(cross_entropy, "CHUNK", 2 * VOCAB)


def inputs(rows: int, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCAB, (rows,), generator=generator)
    with torch.no_grad():
        labels[::4] = (hidden @ weight.t()).argmax(dim=1)[::4]
    labels[1::5] = IGNORE_LABEL
    return hidden, weight, torch.randn(VOCAB, generator=generator).requires_grad_() if bias else None, labels


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 48])
def test_same_loss_and_gradients(rows: int, bias: bool) -> None:
    hidden, weight, offset, labels = inputs(rows, bias)
    leaves = [leaf for leaf in (hidden, weight, offset) if leaf is not None]
    total, correct = linear_cross_entropy_sum(hidden, weight, offset, labels)
    logits = hidden.double() @ weight.double().t() + (0 if offset is None else offset.double())
    exact = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=1e-30)
    assert correct.item() == (logits.argmax(dim=1) == labels).sum().item()
    for gradient, wanted in zip(
        torch.autograd.grad(total / 7, leaves), torch.autograd.grad(exact / 7, leaves), strict=True
    ):
        assert gradient.dtype == torch.float32
        assert relative(gradient, wanted) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast(dtype: torch.dtype) -> None:
    """As near to the exact gradients as the plain form; float16 keeps what the loss scale makes visible."""
    hidden, weight, _, labels = inputs(48, False)
    leaves = [hidden, weight]
    scale = 2.0**12 if dtype == torch.float16 else 1.0

    def gradients(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=dtype):
            total = loss()
        return tuple(gradient / scale for gradient in torch.autograd.grad(total * scale / 1000, leaves))

    exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="sum")
    wanted = torch.autograd.grad(exact / 1000, leaves)
    fused = gradients(lambda: linear_cross_entropy_sum(hidden, weight, None, labels)[0])
    plain = gradients(lambda: cross_entropy_sum(nn.functional.linear(hidden, weight), labels)[0])
    for ours, theirs, true in zip(fused, plain, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours, true) <= 1.2 * relative(theirs, true) + 1e-6


def test_frozen_parts_get_no_gradient() -> None:
    hidden, weight, offset, labels = inputs(12, True)
    assert offset is not None
    weight.requires_grad_(False)
    total, _ = linear_cross_entropy_sum(hidden, weight, offset, labels)
    total.backward()
    assert weight.grad is None
    assert hidden.grad is not None
    assert offset.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy_sum(hidden, weight, offset, labels)[0].requires_grad


def test_backward_may_run_twice() -> None:
    """Gradients are given away, so a second pass computes them again, whatever was done to the first ones."""
    hidden, weight, _, labels = inputs(12, False)
    total, _ = linear_cross_entropy_sum(hidden, weight, None, labels)
    first = torch.autograd.grad(total * 3, weight, retain_graph=True)[0]
    kept = first.clone()
    first.zero_()
    torch.testing.assert_close(torch.autograd.grad(total * 3, weight)[0], kept, rtol=1e-6, atol=1e-6)


def test_the_gradient_is_handed_over_without_a_copy() -> None:
    hidden, weight, _, labels = inputs(12, False)
    total, _ = linear_cross_entropy_sum(hidden, weight, None, labels)
    address = total.grad_fn.gradients[1].data_ptr()  # type: ignore[union-attr, attr-defined]
    total.backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == address


SIZES: dict[str, Any] = {
    "encoder": "transformer",
    "emb_size": WIDTH,
    "hidden_size": WIDTH,
    "feed_forward_size": 48,
    "num_heads": 4,
    "num_layers": 1,
    "hidden_act": "gelu",
    "dropout": 0.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "lm": {"embedding": ("word", "pos"), "mask": "causal", "target": ("lm",)},
    "lm with bias, scale, tied": {
        "embedding": ("word", "pos"),
        "mask": "causal",
        "target": ("lm",),
        "lm_bias": True,
        "lm_scale": True,
        "tie_weights": True,
    },
    "mlm": {"embedding": ("word", "pos", "seg"), "mask": "fully_visible", "target": ("mlm",), "tie_weights": True},
    "bilm": {"embedding": ("word",), "encoder": "bilstm", "target": ("bilm",)},
    "smoothed": {"embedding": ("word", "pos"), "mask": "causal", "target": ("lm",), "label_smoothing": 0.1},
}


def tiny(kind: str) -> Model:
    return build_model(ModelConfig.model_validate({**SIZES, **MODELS[kind]}), VOCAB, seed=2, std=0.3)


def batch_for(model: Model) -> Batch:
    generator = torch.Generator().manual_seed(1)
    token_ids, first, second = (torch.randint(5, VOCAB, (3, 10), generator=generator) for _ in range(3))
    segment_ids = torch.ones_like(token_ids)
    segment_ids[1, 7:] = 0
    labels = {"lm": first, "mlm": first.where(second % 3 == 0, 0), "bilm_forward": first, "bilm_backward": second}
    first[0, 3] = IGNORE_LABEL
    return Batch(token_ids=token_ids, segment_ids=segment_ids, labels=labels)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often the fused form is used, and lowers its threshold."""
    seen: list[int] = []

    def counted(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        seen.append(len(hidden))
        return linear_cross_entropy_sum(hidden, *rest)

    monkeypatch.setattr(cross_entropy, "linear_cross_entropy_sum", counted)
    monkeypatch.setattr(cross_entropy, "FUSED_FROM", 1)
    return seen


@pytest.mark.parametrize("kind", list(MODELS))
def test_targets(kind: str, calls: list[int]) -> None:
    model = tiny(kind)
    batch = batch_for(model)
    results = []
    for fused in (True, False):
        for target in model.target.children():
            target.fused_loss = fused  # type: ignore[assignment]
        losses = model(batch).losses
        model.zero_grad()
        torch.stack([loss.total for loss in losses.values()]).sum().backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        results.append((losses, gradients))
    (fused_losses, fused_gradients), (losses, gradients) = results
    assert len(calls) == {"bilm": 2, "smoothed": 0}.get(kind, 1)
    for name, loss in losses.items():
        torch.testing.assert_close(fused_losses[name].total, loss.total, rtol=1e-6, atol=0)
        assert fused_losses[name].count == loss.count
        assert fused_losses[name].correct == loss.correct
    assert fused_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # Biases of keys cancel in the softmax, so what is left of their gradients is rounding.
        bound = 2e-6 * gradient.norm() + 1e-5
        assert (fused_gradients[name] - gradient).norm() <= bound, name


def test_the_plain_form_where_the_head_is_looked_at(calls: list[int]) -> None:
    model = tiny("lm")
    batch = batch_for(model)
    with Taps(model, "logits.lm") as taps:
        model(batch)
        assert taps["logits.lm"].shape == (26, VOCAB)
    assert not calls
    head = model.head()
    assert head is not None
    handle = head.register_forward_pre_hook(lambda module, given: None)
    model(batch)
    handle.remove()
    assert not calls
    with Taps(model, "target.lm.output_layer"):
        model(batch)
    assert not calls
    model(batch)
    assert calls == [26]
    with torch.no_grad():
        model(batch)
    assert calls == [26, 26]


def test_small_losses_keep_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "linear_cross_entropy_sum", None)
    model = tiny("lm")
    model(batch_for(model)).loss.backward()


def test_an_adapter_on_the_head_keeps_the_plain_form(calls: list[int]) -> None:
    model = tiny("lm")

    class Adapted(nn.Linear):
        """A head that is more than its weight."""

        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    target = model.target.get_submodule("lm")
    target.output_layer = Adapted(WIDTH, VOCAB, bias=False)
    model(batch_for(model))
    assert not calls
