"""Golden vectors of the interface specification, appendix A.1 and A.4 (text rows). Needs no shared folder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.embeddings.sinusoidalpos import SinusoidalPositions
from tencentpretrain.layers.activations import ACTIVATIONS
from tencentpretrain.layers.initialization import LOGIT_SCALE
from tencentpretrain.layers.norm import build_norm
from tencentpretrain.layers.pooling import pool
from tencentpretrain.layers.position_bias import alibi_slopes, relative_bucket
from tencentpretrain.layers.rotary import RotaryPositions, rotate
from tencentpretrain.model import Model, build_model

POINTS = torch.tensor([-2, -1, -0.5, 0, 0.5, 1, 2])


def close(ours: Tensor, expected: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours.detach(), torch.as_tensor(expected), atol=atol, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("normal", [-1.161894, -0.387298, 0.387298, 1.161894]),
        ("t5", [0.365148, 0.730297, 1.095445, 1.460593]),
        ("rms", [0.365148, 0.730297, 1.095445, 1.460593]),
    ],
)
def test_norms(kind: Any, expected: list[float]) -> None:
    close(build_norm(kind, 4, 1e-6, "toolkit")(torch.tensor([1.0, 2, 3, 4])), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gelu", [-0.045500, -0.158655, -0.154269, 0, 0.345731, 0.841345, 1.954500]),
        ("gelu_fast", [-0.045402, -0.158808, -0.154286, 0, 0.345714, 0.841192, 1.954598]),
        ("silu", [-0.238406, -0.268941, -0.188770, 0, 0.311230, 0.731059, 1.761594]),
    ],
)
def test_activations(name: str, expected: list[float]) -> None:
    close(ACTIVATIONS[name](POINTS), expected)


def test_rotary() -> None:
    table = RotaryPositions(4)(2, torch.device("cpu"))
    close(table[0][1], [0.540302, 0.999950])
    close(table[1][1], [0.841471, 0.010000])
    x = torch.tensor([5.0, 6, 7, 8]).expand(1, 1, 2, 4)
    close(rotate(x, table)[0, 0], [[5, 6, 7, 8], [-2.347314, 7.449168, 6.919652, 8.069599]])


@pytest.mark.parametrize(
    ("num_heads", "expected"),
    [
        (2, [0.0625, 0.00390625]),
        (4, [0.25, 0.0625, 0.015625, 0.00390625]),
        (6, [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]),
        (8, [2.0**-power for power in range(1, 9)]),
        (12, [*(2.0**-power for power in range(1, 9)), 0.707107, 0.353553, 0.176777, 0.088388]),
    ],
)
def test_alibi_slopes(num_heads: int, expected: list[float]) -> None:
    close(alibi_slopes(num_heads), expected)


def test_sinusoids() -> None:
    positions = SinusoidalPositions(ModelConfig(emb_size=4, max_seq_length=2), 9)
    table = positions.table(5, torch.device("cpu"))
    rows = [
        [0.841471, 0.540302, 0.0001, 1],
        [0.909297, -0.416147, 0.0002, 1],
        [0.14112, -0.989992, 0.0003, 1],
        [-0.756802, -0.653644, 0.0004, 1],
    ]
    close(table[1:5], rows)
    close(positions(torch.zeros(1, 4), torch.tensor([[1, 1, 1, 0]]))[0], [*rows[1:], [0, 0, 0, 0]])
    close(positions(torch.zeros(1, 4), torch.tensor([[1, 2, 2, 0]]))[0], [*rows[1:], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("kind", "expected"), [("mean", [1.666667, -0.333333]), ("first", [1.0, -1.0]), ("last", [4.0, 0.0])]
)
def test_pooling_by_segment_number(kind: Any, expected: list[float]) -> None:
    hidden = torch.tensor([[[1.0, -1], [2, 0], [3, 5]]])
    close(pool(hidden, torch.tensor([[1, 2, 0]]), kind, "segment")[0], expected)


@pytest.mark.parametrize(
    ("kind", "expected"), [("mean", [1.5, -0.5]), ("first", [1.0, -1.0]), ("last", [2.0, 0.0]), ("max", [2.0, 0.0])]
)
def test_pooling_by_mask(kind: Any, expected: list[float]) -> None:
    hidden = torch.tensor([[[1.0, -1], [2, 0], [3, 5]]])
    close(pool(hidden, torch.tensor([[1, 2, 0]]), kind)[0], expected)


DISTANCES = (
    "-200 -128 -100 -64 -40 -20 -16 -15 -12 -11 -10 -9 -8 -7 -4 -1 0 1 4 7 8 9 10 11 12 15 16 20 40 64 100 128 200"
)
BIDIRECTIONAL = "15 15 15 14 12 10 10 9 9 8 8 8 8 7 4 1 0 17 20 23 24 24 24 24 25 25 26 26 28 30 31 31 31"
UNIDIRECTIONAL = "31 31 30 26 23 17 16 15 12 11 10 9 8 7 4 1 0" + 16 * " 0"


@pytest.mark.parametrize(("bidirectional", "expected"), [(True, BIDIRECTIONAL), (False, UNIDIRECTIONAL)])
def test_relative_buckets(bidirectional: bool, expected: str) -> None:
    distance = torch.tensor([int(word) for word in DISTANCES.split()])
    bucket = relative_bucket(distance, bidirectional=bidirectional, num_buckets=32)
    assert bucket.tolist() == [int(word) for word in expected.split()]


# A.4: whole models with deterministic weights.

TOKEN_IDS = torch.tensor([[2, 5, 6, 7, 3, 0], [2, 8, 9, 3, 10, 3]])
SEGMENTS = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 2, 2]])
BINARY_SEGMENTS = (SEGMENTS > 0).long()
LABELS = {
    "mlm": torch.tensor([[0, 5, 0, 9, 0, 0], [0, 0, 4, 0, 11, 0]]),
    "sp": torch.tensor([1, 0]),
    "lm": torch.tensor([[5, 6, 7, 3, 0, 0], [8, 9, 3, 10, 3, 0]]),
    "cls": torch.tensor([2, 0]),
}
DECODER_LABELS = {"lm": torch.tensor([[5, 6, 7, 3], [8, 9, 3, 0]])}
SIZES: dict[str, Any] = {
    "emb_size": 8,
    "hidden_size": 8,
    "feed_forward_size": 16,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "max_seq_length": 16,
    "dropout": 0.0,
    "hidden_act": "gelu",
}
BERT: dict[str, Any] = {"embedding": ("word", "pos", "seg"), "target": ("mlm", "sp"), "tie_weights": True}
GPT2: dict[str, Any] = {
    "embedding": ("word", "pos"),
    "mask": "causal",
    "layernorm_positioning": "pre",
    "hidden_act": "gelu_fast",
    "embedding_layernorm": False,
    "target": ("lm",),
    "tie_weights": True,
}
T5: dict[str, Any] = {
    "embedding": ("word",),
    "tgt_embedding": ("word",),
    "decoder": "transformer",
    "hidden_act": "relu",
    "relative_position_embedding": True,
    "layernorm_positioning": "pre",
    "layernorm": "t5",
    "transformer_bias": False,
    "attention_scale": False,
    "embedding_layernorm": False,
    "share_embedding": True,
    "target": ("lm",),
}
LLAMA: dict[str, Any] = {
    "embedding": ("word",),
    "hidden_act": "silu",
    "feed_forward": "gated",
    "rotary_position_embedding": True,
    "layernorm": "rms",
    "layernorm_positioning": "pre",
    "mask": "causal",
    "transformer_bias": False,
    "embedding_layernorm": False,
    "target": ("lm",),
}
RECURRENT: dict[str, Any] = {"embedding": ("word",), "embedding_layernorm": False, "target": ("lm",)}
BART: dict[str, Any] = {
    "embedding": ("word", "pos"),
    "tgt_embedding": ("word", "pos"),
    "decoder": "transformer",
    "share_embedding": True,
    "lm_bias": True,
    "target": ("lm",),
}
PEGASUS: dict[str, Any] = {
    **BART,
    "embedding": ("word", "sinusoidalpos"),
    "tgt_embedding": ("word", "sinusoidalpos"),
    "hidden_act": "relu",
    "layernorm_positioning": "pre",
    "embedding_layernorm": False,
    "binary": True,
}
TRANSFORMER_MT: dict[str, Any] = {
    **PEGASUS,
    "layernorm_positioning": "post",
    "embedding_layernorm": True,
    "share_embedding": False,
    "lm_bias": False,
    "tie_weights": True,
}

# name: settings, losses, right answers, features [0, 1, :4], sum of absolute values, parameters (None: not stated)
ROWS: dict[str, tuple[dict[str, Any], list[float], list[int] | None, list[float], float, int | None]] = {
    "bert": (BERT, [4.268303, 0.696928], [0, 1], [-2.538886, 0.347535, 0.197088, 1.087299], 75.5841, 1834),
    "bert residual": (
        {**BERT, "residual_attention": True},
        [4.271383, 0.696288],
        None,
        [-2.543744, 0.357414, 0.197314, 1.088158],
        75.5493,
        1834,
    ),
    "albert": (
        {
            **BERT,
            "emb_size": 4,
            "factorized_embedding": True,
            "parameter_sharing": True,
            "hidden_act": "relu",
            "tie_weights": False,
        },
        [3.202055, 0.694582],
        None,
        [-0.062308, -0.625157, 0.156097, 0.990886],
        68.5925,
        1146,
    ),
    "gpt2": (GPT2, [3.468136], None, [-1.687058, -0.019022, 0.314662, 0.548254], 76.7860, 1600),
    "gpt2 prefix mask": (
        {**GPT2, "mask": "causal_with_prefix"},
        [3.479386],
        None,
        [-1.766518, -0.087270, 0.385231, 0.625566],
        76.8182,
        1600,
    ),
    "gpt2 prefix mask and loss": (
        {**GPT2, "mask": "causal_with_prefix", "prefix_lm_loss": True},
        [3.505729],
        None,
        [-1.766518, -0.087270, 0.385231, 0.625566],
        76.8182,
        1600,
    ),
    "t5": (T5, [3.610370], None, [-1.667950, -1.712781, 0.208233, -1.236266], 52.9390, 3296),
    "t5-v1.1": (
        {**T5, "feed_forward": "gated", "hidden_act": "gelu_fast", "head_dim": 6},
        [3.653340],
        None,
        [-1.427220, 0.782402, -0.307789, -0.372035],
        51.8432,
        4576,
    ),
    "bart": (BART, [3.518420], None, [-1.619349, 0.145040, 0.633222, -1.301026], 50.1325, 3840),
    "pegasus": (PEGASUS, [3.690043], None, [-0.940114, -1.089275, 0.924379, -0.330588], 40.9635, 3584),
    "transformer mt": (TRANSFORMER_MT, [3.517528], None, [1.210481, -0.919890, -1.624037, -0.497648], 51.8665, 3552),
    "llama": (LLAMA, [3.390311], None, [-1.984981, -1.281794, -0.487496, 0.779513], 80.8985, 1832),
    "llama one kv head": (
        {**LLAMA, "num_kv_heads": 1},
        [3.570348],
        None,
        [-0.667469, -1.500157, 0.362612, 0.059299],
        89.1820,
        1704,
    ),
    "llama smoothing": (
        {**LLAMA, "label_smoothing": 0.1},
        [3.412124],
        None,
        [-1.984981, -1.281794, -0.487496, 0.779513],
        80.8985,
        None,
    ),
    "llama smoothing ignore": (
        {**LLAMA, "label_smoothing": 0.1, "ignore_index": True},
        [2.854914],
        None,
        [-1.984981, -1.281794, -0.487496, 0.779513],
        80.8985,
        None,
    ),
    "gatedcnn": (
        {**RECURRENT, "encoder": "gatedcnn", "num_layers": 3, "kernel_size": 3, "block_size": 2},
        [3.470463],
        None,
        [-0.156842, -0.152922, -0.317733, 0.453724],
        18.9434,
        1760,
    ),
    "rnn": (
        {**RECURRENT, "encoder": "rnn"},
        [3.489935],
        None,
        [-0.000127, 0.446163, -0.230758, 0.173460],
        19.2847,
        800,
    ),
    "rnn both": (
        {**RECURRENT, "encoder": "rnn", "bidirectional": True},
        [3.481653],
        None,
        [0.056228, 0.201992, -0.266668, 0.259896],
        14.7230,
        736,
    ),
    "lstm": (
        {**RECURRENT, "encoder": "lstm"},
        [3.483863],
        None,
        [0.010467, -0.182946, -0.002060, 0.014198],
        7.8181,
        1664,
    ),
    "lstm both": (
        {**RECURRENT, "encoder": "lstm", "bidirectional": True},
        [3.458615],
        None,
        [0.025931, 0.041604, -0.081031, -0.109636],
        6.5527,
        1408,
    ),
    "gru": (
        {**RECURRENT, "encoder": "gru"},
        [3.491923],
        None,
        [0.064714, -0.207723, 0.037830, 0.012305],
        11.1567,
        1376,
    ),
    "gru both": (
        {**RECURRENT, "encoder": "gru", "bidirectional": True},
        [3.459081],
        None,
        [0.056444, 0.001055, -0.223026, -0.163096],
        12.9259,
        1184,
    ),
    "birnn": (
        {**RECURRENT, "encoder": "birnn"},
        [3.516457],
        None,
        [-0.092291, 0.444342, 0.251513, -0.201220],
        22.8630,
        704,
    ),
    "bilstm": (
        {**RECURRENT, "encoder": "bilstm"},
        [3.472920],
        None,
        [0.165798, 0.105057, 0.101434, -0.006529],
        8.5726,
        1280,
    ),
    "bigru": (
        {**RECURRENT, "encoder": "bigru"},
        [3.465320],
        None,
        [0.215705, 0.134982, 0.247524, -0.119064],
        15.1012,
        1088,
    ),
    "cls": (
        {**BERT, "target": ("cls",), "num_labels": 3, "pooling": "mean", "pooling_weighting": "segment"},
        [1.362480],
        None,
        [-2.538886, 0.347535, 0.197088, 1.087299],
        75.5841,
        1723,
    ),
}


def fill(model: Model) -> None:
    """Gives every tensor its deterministic values; a tied tensor takes those of its first name in module order."""
    done: set[int] = set()
    with torch.no_grad():
        for part in ("embedding", "encoder", "tgt_embedding", "decoder", "target"):
            for key, parameter in model.named_parameters(remove_duplicate=False):
                if not key.startswith(f"{part}.") or id(parameter) in done:
                    continue
                done.add(id(parameter))
                if key.endswith("logit_scale"):
                    parameter.fill_(LOGIT_SCALE)
                    continue
                s = 0 if "relative_attention_bias" in key else sum(map(ord, key)) % 1009
                index = torch.arange(parameter.numel(), dtype=torch.int64)
                values = 0.6 * ((((index**2 + s * index + s) * 856) % 1009).double() / 1009 - 0.5)
                is_scale = key.endswith("gamma") or ("layer_norm" in key and key.endswith("weight"))
                parameter.copy_((values + is_scale).view(parameter.shape))


@pytest.mark.parametrize("name", ROWS)
def test_whole_model(name: str) -> None:
    settings, losses, correct, features, total, count = ROWS[name]
    settings = dict(settings)
    binary = settings.pop("binary", False)
    model = build_model(ModelConfig(**{**SIZES, **settings}), 32).eval()
    fill(model)
    decoder = settings.get("decoder") is not None
    batch = Batch(
        token_ids=TOKEN_IDS,
        segment_ids=BINARY_SEGMENTS if binary else SEGMENTS,
        labels=DECODER_LABELS if decoder else LABELS,
        decoder_token_ids=torch.tensor([[2, 5, 6, 7], [2, 8, 9, 3]]) if decoder else None,
        decoder_segment_ids=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]) if decoder else None,
    )
    hidden, _ = model.features(batch)
    assert isinstance(hidden, Tensor)
    close(hidden[0, 1, :4], features)
    close(hidden.abs().sum(), total, atol=2e-4)
    output = model(batch)
    assert tuple(output.losses) == model.config.target
    close(torch.stack([loss.mean for loss in output.losses.values()]), losses)
    if correct is not None:
        assert [int(loss.correct) for loss in output.losses.values()] == correct
    if count is not None:
        assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_siamese_model() -> None:
    stream = {**SIZES, "embedding": ("word", "pos", "seg"), "pooling": "mean"}
    streams = (ModelConfig(**stream), ModelConfig(**stream))
    config = ModelConfig(
        embedding=("dual",),
        encoder="dual",
        target=("clr",),
        tie_weights=True,
        dropout=0.0,
        pooling_weighting="segment",
        streams=streams,
    )
    model = build_model(config, 32).eval()
    fill(model)
    batch = Batch(token_ids=(TOKEN_IDS, TOKEN_IDS.flip(0)), segment_ids=(SEGMENTS, SEGMENTS.flip(0)))
    hidden, _ = model.features(batch)
    close(hidden[0][0, 1, :4], [-2.025605, -0.546487, 0.015603, 1.168508])
    close(hidden[1][0, 1, :4], [-1.562116, -0.748271, 0.036403, 0.227520])
    close(hidden[0].abs().sum(), 70.0544, atol=2e-4)
    close(hidden[1].abs().sum(), 75.7627, atol=2e-4)
    loss = model(batch).losses["clr"]
    close(loss.mean, 4.006343)
    assert int(loss.correct) == 0
    assert sum(parameter.numel() for parameter in model.parameters()) == 1657
