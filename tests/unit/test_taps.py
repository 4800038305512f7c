"""Reading and replacing named values of a forward pass."""

from __future__ import annotations

import pytest
import torch

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.errors import ConfigError
from tencentpretrain.model import Model, build_model
from tencentpretrain.taps import Taps

SIZES = {
    "emb_size": 8,
    "hidden_size": 8,
    "feed_forward_size": 16,
    "hidden_act": "gelu",
    "num_heads": 2,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "dropout": 0.0,
}


def bert(**settings: object) -> Model:
    return build_model(ModelConfig(**{**SIZES, "target": ("mlm", "sp"), **settings}), 20, seed=0).eval()  # type: ignore[arg-type]


def batch() -> Batch:
    token_ids = torch.tensor([[2, 5, 6, 7], [2, 8, 9, 0]])
    return Batch(
        token_ids=token_ids,
        segment_ids=(token_ids > 0).long(),
        labels={"mlm": torch.tensor([[0, 5, 6, 0], [0, 4, 0, 0]]), "sp": torch.tensor([0, 1])},
    )


def test_reads_every_stage() -> None:
    model = bert(layernorm_positioning="pre")
    names = ["embedding", "encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "encoder", "logits.mlm", "logits.sp"]
    with Taps(model, *names) as taps:
        model(batch())
    assert sorted(taps) == sorted(names)
    assert taps["embedding"].shape == (2, 4, 8)
    assert taps["logits.mlm"].shape == (3, 20)
    assert taps["logits.sp"].shape == (2, 2)
    assert model.encoder.layer_norm is not None
    assert torch.equal(model.encoder.layer_norm(taps["encoder.layer.2"]), taps["encoder"])  # type: ignore[operator]
    assert torch.equal(model.features(batch())[0], taps["encoder"])


def test_layers_of_one_shared_block_are_told_apart() -> None:
    model = bert(parameter_sharing=True)
    with Taps(model, "encoder.layer.0", "encoder.layer.1") as taps:
        model(batch())
    assert not torch.equal(taps["encoder.layer.0"], taps["encoder.layer.1"])


def test_values_carry_gradients_unless_detached() -> None:
    model = bert()
    with Taps(model, "encoder") as taps:
        model(batch())
    assert taps["encoder"].requires_grad
    with Taps(model, "encoder", detach=True) as taps:
        model(batch())
    assert not taps["encoder"].requires_grad


def test_replaces_a_value() -> None:
    model = bert()
    plain = model(batch()).losses["sp"].total
    with Taps(model, replace={"encoder.layer.1": torch.zeros_like}) as taps:
        changed = model(batch()).losses["sp"].total
    assert float(taps["encoder.layer.1"].abs().sum()) == 0
    assert not torch.equal(plain, changed)
    assert torch.equal(model(batch()).losses["sp"].total, plain)


def test_leaves_no_hook_behind_even_after_an_error() -> None:
    model = bert()
    with pytest.raises(RuntimeError, match="stop"), Taps(model, "encoder"):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())


def test_reads_the_layers_of_an_encoder_decoder_and_its_checkpointed_training() -> None:
    model = bert(decoder="transformer", target=("lm",)).train()
    model.set_gradient_checkpointing(True)
    given = batch()
    given = Batch(
        token_ids=given.token_ids,
        segment_ids=given.segment_ids,
        decoder_token_ids=given.token_ids,
        decoder_segment_ids=given.segment_ids,
        labels={"lm": given.token_ids},
    )
    with Taps(model, "tgt_embedding", "decoder.layer.1", "decoder", "logits.lm") as taps:
        model(given).loss.backward()
    assert torch.equal(taps["decoder.layer.1"], taps["decoder"])
    assert taps["logits.lm"].shape == (7, 20)


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nothing named 'logits\.mml' to tap; did you mean 'logits\.mlm'"):
        Taps(bert(), "logits.mml")
    with Taps(bert(), "encoder") as taps, pytest.raises(KeyError, match="no forward pass has reached it"):
        taps["encoder"]
