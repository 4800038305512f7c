"""Low-rank adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.errors import ConfigError
from tencentpretrain.methods.lora import add_lora, lora_state_dict, mark_only_lora_trainable, merge_lora
from tencentpretrain.model import Model, build_model


def build(**settings: Any) -> Model:
    sizes = {"emb_size": 16, "hidden_size": 16, "feed_forward_size": 32, "hidden_act": "silu", "num_heads": 4}
    config = ModelConfig(
        **{**sizes, "num_layers": 2, "dropout": 0.0, "mask": "causal", "target": ("lm",), "num_kv_heads": 2, **settings}
    )
    return build_model(config, 30, seed=0)


def batch(decoder: bool = False) -> Batch:
    tokens = torch.randint(1, 30, (2, 6), generator=torch.Generator().manual_seed(1))
    ones = torch.ones_like(tokens)
    target = {"decoder_token_ids": tokens, "decoder_segment_ids": ones} if decoder else {}
    return Batch(token_ids=tokens, segment_ids=ones, labels={"lm": tokens}, **target)


def test_adapters_start_at_nothing_and_learn_alone() -> None:
    model = build()
    before = model(batch()).loss
    assert add_lora(model, r=3, alpha=6, dropout=0.1) == 4
    mark_only_lora_trainable(model)
    assert torch.equal(model.eval()(batch()).loss, before)
    model.train()(batch()).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(lora_state_dict(model))
    assert len(trained) == 8


def test_names_and_widths_with_grouped_heads() -> None:
    model = build()
    add_lora(model, r=3, alpha=6)
    prefix = "encoder.transformer.1.self_attn.linear_layers"
    shapes = {name: tuple(tensor.shape) for name, tensor in lora_state_dict(model).items() if name.startswith(prefix)}
    assert shapes == {
        f"{prefix}.0.lora_A": (3, 16),
        f"{prefix}.0.lora_B": (16, 3),
        f"{prefix}.2.lora_A": (3, 16),
        f"{prefix}.2.lora_B": (8, 3),
    }


def test_decoders_are_adapted_too() -> None:
    model = build(decoder="transformer", num_decoder_layers=1, mask="fully_visible")
    assert add_lora(model, r=2, alpha=2) == 2 * (2 + 2)
    assert model(batch(decoder=True)).loss.isfinite()


def test_merging_keeps_the_function_and_the_names() -> None:
    model = build().eval()
    names = set(model.state_dict())
    add_lora(model, r=2, alpha=8)
    with torch.no_grad():
        for tensor in lora_state_dict(model).values():
            tensor.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    adapted = model(batch()).loss
    assert merge_lora(model) == 4
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(batch()).loss, adapted, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        add_lora(build(), r=0, alpha=1)
    with pytest.raises(ConfigError, match="needs a model with attention"):
        add_lora(build(encoder="lstm", embedding=("word",)), r=2, alpha=1)
    model = build()
    add_lora(model, r=2, alpha=1)
    with pytest.raises(ConfigError, match="already"):
        add_lora(model, r=2, alpha=1)
