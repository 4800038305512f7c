"""Every registered embedding, encoder, decoder and target keeps the promises that all of them make."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import IGNORE_LABEL, Batch
from tencentpretrain.errors import ConfigError, DataFormatError
from tencentpretrain.model import Model, build_model
from tencentpretrain.registry import DECODERS, EMBEDDINGS, ENCODERS, TARGETS

VOCAB_SIZE = 40
SIZES: dict[str, Any] = {
    "emb_size": 16,
    "hidden_size": 16,
    "feed_forward_size": 32,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "max_seq_length": 12,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "kernel_size": 3,
    "block_size": 1,
    "num_labels": 3,
}
STREAM = ModelConfig(**SIZES, embedding=("word", "pos", "seg"), pooling="mean")
DUAL: dict[str, Any] = {
    "embedding": ("dual",),
    "encoder": "dual",
    "target": ("clr",),
    "projection": True,
    "feature_size": 6,
    "streams": (STREAM, STREAM),
}
PRE_RMS: dict[str, Any] = {"layernorm": "rms", "layernorm_positioning": "pre", "feed_forward": "gated"}
ENCODER_DECODER: dict[str, Any] = {"decoder": "transformer", "target": ("lm",)}

MODELS: dict[str, dict[str, Any]] = {
    **{
        f"encoder {name}": {"encoder": name, "target": ("cls",), "pooling": "mean"}
        for name in ENCODERS.names()
        if name != "dual"
    },
    **{
        f"embedding {name}": {"embedding": ("word", name), "target": ("sp",)}
        for name in ("pos", "seg", "sinusoidalpos")
    },
    **{f"target {name}": {"target": (name,)} for name in TARGETS.names() if name not in ("bilm", "clr")},
    "target bilm": {"encoder": "bilstm", "target": ("bilm",)},
    "dual": DUAL,
    "dual tied": {**DUAL, "tie_weights": True, "projection": False},
    "bidirectional lstm": {"encoder": "lstm", "bidirectional": True, "target": ("cls",), "pooling": "max"},
    "encoder-decoder": ENCODER_DECODER,
    "shared encoder-decoder": {**ENCODER_DECODER, "tie_weights": True, "share_embedding": True, "lm_bias": True},
    "t5": {**ENCODER_DECODER, **PRE_RMS, "layernorm": "t5", "relative_position_embedding": True, "lm_scale": True},
    "factorized": {"emb_size": 8, "factorized_embedding": True, "parameter_sharing": True, "tie_weights": True},
    "causal": {"mask": "causal", "target": ("lm",), "rotary_position_embedding": True, **PRE_RMS},
    "grouped": {"mask": "causal", "target": ("lm",), "num_kv_heads": 2, "qk_norm": True, "qkv_bias": True, **PRE_RMS},
    "alibi": {"mask": "causal", "target": ("lm",), "alibi_position_embedding": True},
    "window": {"mask": "causal", "target": ("lm",), "sliding_window": 3},
    "prefix": {"mask": "causal_with_prefix", "target": ("lm",), "prefix_lm_loss": True},
    "residual": {"residual_attention": True},
    "smoothing": {"target": ("lm",), "label_smoothing": 0.1, "ignore_index": True},
    "standard norm": {"layernorm_form": "standard", "layernorm_positioning": "pre", "decoder_final_norm": "configured"},
    "many targets": {"target": ("mlm", "sp", "cls"), "pooling": "max"},
}


def build(settings: dict[str, Any], seed: int = 0) -> Model:
    config = ModelConfig(**{**SIZES, "embedding": ("word",), **settings})
    model = build_model(config, VOCAB_SIZE, seed=seed)
    # The deviation of 0.02 leaves gradients of deep parts too small to tell from rounding.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


def make_batch(model: Model, *, padded: int = 2, length: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(5)

    def tokens(width: int) -> Tensor:
        return torch.randint(5, VOCAB_SIZE, (2, width), generator=generator)

    segment_ids = torch.ones(2, length, dtype=torch.long)
    segment_ids[:, length // 2 :] = 2
    if padded:
        segment_ids[1, -padded:] = 0
    token_ids = tokens(length)
    labels = {name: tokens(length) for name in ("mlm", "lm", "bilm_forward", "bilm_backward")}
    labels["mlm"][:, ::2] = 0
    labels["mlm"] = labels["mlm"] * (segment_ids > 0)
    labels["sp"], labels["cls"] = torch.tensor([0, 1]), torch.tensor([2, 0])
    if model.config.encoder == "dual":
        return Batch(
            token_ids=(token_ids, tokens(length)), segment_ids=(segment_ids, segment_ids), has_padding=padded > 0
        )
    decoder_token_ids = decoder_segment_ids = None
    if model.decoder is not None:
        decoder_token_ids, decoder_segment_ids = tokens(6), torch.ones(2, 6, dtype=torch.long)
        decoder_segment_ids[0, -1] = 0
        labels["lm"] = tokens(6)
    return Batch(
        token_ids=token_ids,
        segment_ids=segment_ids,
        labels=labels,
        decoder_token_ids=decoder_token_ids,
        decoder_segment_ids=decoder_segment_ids,
        has_padding=padded > 0,
    )


def first(stream: Any) -> Tensor:
    tensor = stream[0] if isinstance(stream, tuple) else stream
    assert isinstance(tensor, Tensor)
    return tensor


def test_every_registered_part_is_covered() -> None:
    configs = [ModelConfig(**{**SIZES, **settings}) for settings in MODELS.values()]
    configs += [STREAM, ModelConfig(embedding=("word",))]
    assert {name for config in configs for name in config.embedding} == set(EMBEDDINGS.names())
    assert {config.encoder for config in configs} == set(ENCODERS.names())
    assert {config.decoder for config in configs} - {None} == set(DECODERS.names())
    assert {name for config in configs for name in config.target} == set(TARGETS.names())


@pytest.mark.parametrize("name", MODELS)
def test_gradient_reaches_every_parameter(name: str) -> None:
    model = build(MODELS[name])
    output = model(make_batch(model))
    output.loss.backward()
    still = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not still
    # A key's bias moves all scores of a row alike, which the softmax does not see.
    flat = [
        key
        for key, parameter in model.named_parameters()
        if not parameter.grad.abs().sum() > 0 and not key.endswith("linear_layers.1.bias")  # type: ignore[union-attr]
    ]
    assert not flat
    for loss in output.losses.values():
        assert loss.total.dtype == torch.float32
        assert loss.count.dtype == torch.int64
        assert loss.count > 0
        assert loss.correct is not None
        assert 0 <= loss.correct <= loss.count


@pytest.mark.parametrize("name", MODELS)
def test_weights_survive_saving(name: str, tmp_path: Path) -> None:
    model = build(MODELS[name]).eval()
    batch = make_batch(model)
    torch.save(model.state_dict(), tmp_path / "model.bin")
    other = build(MODELS[name], seed=1).eval()
    assert not torch.equal(other(batch).loss, model(batch).loss)
    other.load_state_dict(torch.load(tmp_path / "model.bin", weights_only=True), strict=True)
    assert torch.equal(other(batch).loss, model(batch).loss)


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_finite_in_low_precision(name: str) -> None:
    model = build(MODELS[name])
    batch = make_batch(model)
    exact = model(batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, atol=0.15, rtol=0.05)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", [name for name in MODELS if "cnn" not in name])
def test_a_model_may_live_in_bfloat16(name: str) -> None:
    model = build(MODELS[name]).eval()
    batch = make_batch(model)
    exact = model(batch).loss
    torch.testing.assert_close(model.bfloat16()(batch).loss, exact, atol=0.3, rtol=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_sums_add_up_over_pieces_of_a_batch(name: str) -> None:
    if "clr" in MODELS[name].get("target", ()):
        pytest.skip("in-batch negatives depend on the batch")
    model = build(MODELS[name]).eval()
    batch = make_batch(model)
    whole = model(batch).losses

    def piece(index: int) -> Batch:
        def cut(tensor: Any) -> Any:
            return None if tensor is None else tensor[index : index + 1]

        return replace(
            batch,
            token_ids=cut(batch.token_ids),
            segment_ids=cut(batch.segment_ids),
            labels={key: cut(label) for key, label in batch.labels.items()},
            decoder_token_ids=cut(batch.decoder_token_ids),
            decoder_segment_ids=cut(batch.decoder_segment_ids),
        )

    parts = [model(piece(index)).losses for index in range(2)]
    for key, loss in whole.items():
        torch.testing.assert_close(sum(part[key].total for part in parts), loss.total, atol=1e-4, rtol=1e-4)
        assert sum(int(part[key].count) for part in parts) == int(loss.count)
        assert sum(int(part[key].correct) for part in parts) == int(loss.correct)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].get("encoder", "transformer") != "dual"])
def test_has_padding_only_spares_work(name: str) -> None:
    model = build(MODELS[name]).eval()
    batch = make_batch(model, padded=0)
    promised, unknown = model(batch), model(replace(batch, has_padding=True))
    torch.testing.assert_close(promised.loss, unknown.loss, atol=1e-5, rtol=1e-5)
    for key, loss in promised.losses.items():
        assert int(loss.count) == int(unknown.losses[key].count)


RECURRENT = {"rnn", "lstm", "gru", "birnn", "bilstm", "bigru"}
READS_BACKWARD = {"birnn", "bilstm", "bigru"}


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].get("encoder") not in READS_BACKWARD])
def test_padding_changes_nothing(name: str) -> None:
    if MODELS[name].get("bidirectional"):
        pytest.skip("the backward direction starts in the padding, as published models do")
    model = build(MODELS[name]).eval()
    batch = make_batch(model, padded=2)
    changed = first(batch.token_ids).clone()
    changed[1, -2:] = 7
    token_ids = (changed, batch.token_ids[1]) if isinstance(batch.token_ids, tuple) else changed
    hidden, _ = model.features(batch)
    other, _ = model.features(replace(batch, token_ids=token_ids))
    real = slice(None) if model.decoder is not None else slice(-2)
    torch.testing.assert_close(first(other)[1, real], first(hidden)[1, real], atol=1e-6, rtol=1e-6)
    assert torch.equal(first(other)[0], first(hidden)[0])
    torch.testing.assert_close(model(batch).loss, model(replace(batch, token_ids=token_ids)).loss)


CAUSAL = [
    *(name for name in MODELS if MODELS[name].get("mask") == "causal"),
    *(f"encoder {name}" for name in ("rnn", "lstm", "gru", "gatedcnn")),
]


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_do_not_see_ahead(name: str) -> None:
    model = build(MODELS[name]).eval()
    batch = make_batch(model, padded=0)
    changed = first(batch.token_ids).clone()
    changed[:, 5] = 6
    hidden, other = model.features(batch)[0], model.features(replace(batch, token_ids=changed))[0]
    assert torch.allclose(first(hidden)[:, :5], first(other)[:, :5], atol=1e-6)
    assert not torch.allclose(first(hidden)[:, 5], first(other)[:, 5], atol=1e-3)


def test_a_decoder_does_not_see_ahead_but_sees_the_source() -> None:
    for name in ("encoder-decoder", "t5"):
        model = build(MODELS[name]).eval()
        batch = make_batch(model, padded=0)
        assert batch.decoder_token_ids is not None
        changed = batch.decoder_token_ids.clone()
        changed[:, 3] = 6
        hidden = first(model.features(batch)[0])
        other = first(model.features(replace(batch, decoder_token_ids=changed))[0])
        assert torch.allclose(hidden[:, :3], other[:, :3], atol=1e-6)
        assert not torch.allclose(hidden[:, 3], other[:, 3], atol=1e-3)
        source = first(batch.token_ids).clone()
        source[:, -1] = 6
        other = first(model.features(replace(batch, token_ids=source))[0])
        assert not torch.allclose(hidden[:, 0], other[:, 0], atol=1e-5)


def test_a_prefix_is_seen_from_both_sides() -> None:
    model = build(MODELS["prefix"]).eval()
    batch = make_batch(model, padded=0)
    hidden = first(model.features(batch)[0])
    for position, seen in ((2, True), (6, False)):
        changed = first(batch.token_ids).clone()
        changed[:, position] = 6
        other = first(model.features(replace(batch, token_ids=changed))[0])
        assert torch.allclose(hidden[:, position - 1], other[:, position - 1], atol=1e-6) is not seen


def test_a_sliding_window_forgets() -> None:
    model = build({**MODELS["window"], "num_layers": 1}).eval()
    batch = make_batch(model, padded=0)
    changed = first(batch.token_ids).clone()
    changed[:, 0] = 6
    hidden, other = (first(model.features(item)[0]) for item in (batch, replace(batch, token_ids=changed)))
    assert not torch.allclose(hidden[:, 2], other[:, 2], atol=1e-5)
    assert torch.allclose(hidden[:, 3:], other[:, 3:], atol=1e-6)


@pytest.mark.parametrize("name", ["causal", "t5", "residual", "factorized", "prefix"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    model = build({**MODELS[name], "dropout": 0.1}).train()
    batch = make_batch(model)
    gradients = []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(3)
        model(batch).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])  # type: ignore[union-attr]
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept)


def test_labels_to_ignore_count_nowhere() -> None:
    for target, label in (("lm", "lm"), ("bilm", "bilm_forward"), ("mlm", "mlm")):
        model = build({"target": (target,), "encoder": "bigru" if target == "bilm" else "transformer"}).eval()
        for padded in (0, 2):
            batch = make_batch(model, padded=padded)
            labels = dict(batch.labels)
            before = int(model(batch).losses[label].count)
            labels[label] = labels[label].clone()
            labels[label][0, 1] = IGNORE_LABEL
            loss = model(replace(batch, labels=labels)).losses[label]
            assert int(loss.count) == before - 1
            assert loss.total.isfinite()


def test_no_predicted_position_is_no_error() -> None:
    model = build({"target": ("mlm",)})
    batch = make_batch(model)
    loss = model(replace(batch, labels={"mlm": torch.zeros_like(batch.labels["mlm"])})).losses["mlm"]
    loss.mean.backward()
    assert float(loss.mean.detach()) == 0
    assert int(loss.count) == 0


def test_tying_comes_last() -> None:
    model = build(MODELS["shared encoder-decoder"])
    tables = [
        model.state_dict(keep_vars=True)[name]
        for name in (
            "embedding.word.embedding.weight",
            "tgt_embedding.word.embedding.weight",
            "target.lm.output_layer.weight",
        )
    ]
    assert all(one is other for one, other in itertools.combinations(tables, 2))
    model.untie_head()
    assert model.head() is not None
    assert model.head().weight is not tables[0]  # type: ignore[union-attr]
    assert torch.equal(model.head().weight, tables[0])  # type: ignore[union-attr]
    assert model.tgt_embedding.get_submodule("word.embedding").weight is tables[0]  # type: ignore[union-attr]


def test_building_changes_no_configuration() -> None:
    for settings in MODELS.values():
        config = ModelConfig(**{**SIZES, "embedding": ("word",), **settings})
        before = config.model_dump()
        build_model(config, VOCAB_SIZE)
        assert config.model_dump() == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": None}, "hidden_size: is missing, but encoder 'transformer' needs it"),
        ({"num_heads": 3}, "heads_num 3 does not divide"),
        ({"feed_forward_size": None}, "feedforward_size: is missing"),
        ({"emb_size": 8}, "emb_size: is 8, but hidden_size is 16"),
        ({"target": ("clr",)}, "'clr' compares two streams"),
        ({"encoder": "dual"}, "stream_0: is missing"),
        ({"target": ("cls",), "num_labels": None}, "labels_num is not set, but target 'cls' needs it"),
        ({"sliding_window": 4}, "sliding_window: works with mask causal only"),
        ({"encoder": "transfomer"}, "did you mean 'transformer'"),
        ({"embedding": ("word", "position")}, "unknown embedding 'position'"),
        ({"encoder": "lstm", "emb_size": 8, "tie_weights": True, "target": ("lm",)}, "the head reads 16"),
        ({**ENCODER_DECODER, "share_embedding": True, "tgt_vocab_size": 7}, "one vocabulary for source and target"),
    ],
)
def test_contradictions_are_named(settings: dict[str, Any], words: str) -> None:
    settings = dict(settings)
    tgt_vocab_size = settings.pop("tgt_vocab_size", None)
    with pytest.raises(ConfigError, match=words):
        build_model(
            ModelConfig(**{**SIZES, "embedding": ("word",), **settings}), VOCAB_SIZE, tgt_vocab_size=tgt_vocab_size
        )


def test_missing_labels_and_too_long_input_are_named() -> None:
    model = build({"target": ("sp",), "embedding": ("word", "pos")})
    batch = make_batch(model)
    with pytest.raises(DataFormatError, match="needs the labels 'sp', but the batch has: lm"):
        model(replace(batch, labels={"lm": batch.labels["lm"]}))
    with pytest.raises(DataFormatError, match="13 positions does not fit the 12 learned positions"):
        model(make_batch(model, length=13))


def test_initial_weights_go_by_type() -> None:
    config = ModelConfig(**{**SIZES, "hidden_size": 64, "emb_size": 64, "target": ("mlm",), **PRE_RMS})
    model = build_model(config, 400, deep_init=True, seed=1)
    for name, parameter in model.named_parameters():
        if "layer_norm" in name and not name.endswith("beta"):
            assert bool((parameter == 1).all()), name
        elif name.endswith(("bias", "beta")):
            assert bool((parameter == 0).all()), name
        else:
            narrow = name.startswith("encoder") and ("linear_2" in name or "final_linear" in name)
            expected = 0.02 / 2 if narrow else 0.02
            assert abs(float(parameter.detach().std()) / expected - 1) < 0.1, name
    again = build_model(config, 400, deep_init=True, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    clr = build(MODELS["dual"]).target.get_submodule("clr")
    assert clr.logit_scale.item() == pytest.approx(2.659260)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("name", ["target mlm", "causal", "t5", "dual"])
def test_the_body_is_one_graph(name: str) -> None:
    torch.compiler.reset()
    model = build(MODELS[name]).eval()
    compiled = torch.compile(model.features, backend="eager", fullgraph=True)
    for length in (8, 9):
        batch = make_batch(model, length=length)
        torch.testing.assert_close(compiled(batch)[0], model.features(batch)[0], atol=1e-5, rtol=1e-5)
