"""Attention, masks and positions against direct formulas and independent libraries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tencentpretrain.config.model import ModelConfig, RopeScaling
from tencentpretrain.embeddings.sinusoidalpos import SinusoidalPositions
from tencentpretrain.layers.attention import Attention
from tencentpretrain.layers.build import build_attention, build_rotary
from tencentpretrain.layers.masks import AttentionMask, additive_mask, attention_mask
from tencentpretrain.layers.pooling import pool
from tencentpretrain.layers.position_bias import AlibiBias, RelativePositionBias, alibi_slopes
from tencentpretrain.layers.rotary import RotaryPositions, rotate

CPU = torch.device("cpu")


def explicit(attention: Attention, x: Tensor, hidden: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Attention written out: `hidden` is True where a key must not be seen."""
    query, key, value = attention.project(x, x, None)
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("bnqd,bnkd->bnqk", query, key) * attention.scale
    if bias is not None:
        scores = scores + bias
    if hidden is not None:
        scores = scores.masked_fill(hidden, -1e9)
    mixed = torch.einsum("bnqk,bnkd->bqnd", scores.softmax(-1), value).flatten(2)
    output: Tensor = attention.final_linear(mixed)
    return output


def make_attention(**settings: Any) -> Attention:
    torch.manual_seed(0)
    return build_attention(ModelConfig(**{"hidden_size": 24, "num_heads": 4, "dropout": 0.0, **settings})).eval()


def test_masked_attention_equals_the_formula() -> None:
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    segment_ids = torch.tensor([[1, 1, 2, 2, 0], [1, 2, 2, 2, 2]])
    causal = torch.ones(5, 5).triu(1).bool()
    padding = (segment_ids == 0)[:, None, None, :]
    prefix = padding | (causal & (segment_ids != 1)[:, None, None, :])
    bias = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(2))
    for settings in ({}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "head_dim": 10, "attention_scale": False}):
        attention = make_attention(**settings)
        for kind, hidden in (("fully_visible", padding), ("causal", causal), ("causal_with_prefix", prefix)):
            for added in (None, bias):
                mask = attention_mask(kind, segment_ids, bias=added)  # type: ignore[arg-type]
                torch.testing.assert_close(attention(x, mask=mask), explicit(attention, x, hidden, added))


def test_no_mask_is_built_where_none_is_needed() -> None:
    segment_ids = torch.ones(2, 6, dtype=torch.long)
    assert attention_mask("fully_visible", segment_ids, has_padding=False) == AttentionMask()
    assert attention_mask("causal", segment_ids) == AttentionMask(is_causal=True)
    assert attention_mask("causal", segment_ids, window=6) == AttentionMask(is_causal=True)
    padding = attention_mask("fully_visible", segment_ids).mask
    assert padding is not None
    assert padding.shape == (2, 1, 1, 6)
    assert padding.dtype == torch.bool


@pytest.mark.parametrize("kind", ["fully_visible", "causal_with_prefix"])
def test_a_row_that_sees_nothing_ignores_its_mask(kind: Any) -> None:
    attention = make_attention()
    x = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(1))
    segment_ids = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]])
    ours = attention(x, mask=attention_mask(kind, segment_ids))
    torch.testing.assert_close(ours[0], attention(x[:1])[0])
    additive = additive_mask(kind, segment_ids)
    assert additive is not None
    published, _ = attention.forward_residual(x, None, additive=additive)
    # Scores near -10000 have a resolution of 1e-3 in float32.
    torch.testing.assert_close(ours, published, atol=5e-4, rtol=5e-3)


def test_scores_and_masks_pass_from_layer_to_layer() -> None:
    attention = make_attention()
    x = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(1))
    additive = additive_mask("fully_visible", torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    first, scores = attention.forward_residual(x, None, additive=additive)
    torch.testing.assert_close(first, attention(x, mask=AttentionMask(mask=additive)))
    _, again = attention.forward_residual(x, scores, additive=additive)
    torch.testing.assert_close(again, 2 * scores)


def test_query_and_key_heads_are_normed_before_rotation() -> None:
    attention = make_attention(qk_norm=True, num_kv_heads=2)
    assert {"q_norm.weight", "k_norm.weight"} <= set(attention.state_dict())
    table = RotaryPositions(6)(3, CPU)
    query, key, _ = attention.project(*2 * [torch.randn(1, 3, 24) * 50], table)
    for heads in (query, key):
        torch.testing.assert_close(heads.square().mean(-1), torch.ones(heads.shape[:-1]))


def test_rotation_depends_on_distance_alone_and_keeps_lengths() -> None:
    positions = RotaryPositions(8)
    q, k = torch.randn(2, 8).unbind(0)
    near, far = (rotate(q.expand(1, 1, 40, 8), positions(40, CPU)), rotate(k.expand(1, 1, 40, 8), positions(40, CPU)))
    scores = torch.einsum("bnqd,bnkd->qk", near, far)
    torch.testing.assert_close(scores[5, 2], scores[33, 30], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(near.norm(dim=-1), q.norm().expand(1, 1, 40))
    assert rotate(q.expand(1, 1, 40, 8).bfloat16(), positions(40, CPU)).dtype == torch.bfloat16


def test_rotary_tables_grow_and_continue() -> None:
    positions = RotaryPositions(8, max_length=4)
    short, long = positions(4, CPU), positions(50, CPU)
    torch.testing.assert_close(long[0][:4], short[0])
    later = positions(3, CPU, start=45)
    torch.testing.assert_close(later[1], long[1][45:48])


SCALINGS: list[dict[str, Any]] = [
    {"type": "linear", "factor": 4.0},
    {"type": "dynamic", "factor": 2.0, "original_max_seq_length": 64},
    {
        "type": "llama3",
        "factor": 8.0,
        "original_max_seq_length": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    {"type": "yarn", "factor": 4.0, "original_max_seq_length": 64},
    {"type": "yarn", "factor": 16.0, "original_max_seq_length": 32, "beta_fast": 20.0, "attention_factor": 1.5},
]


@pytest.mark.parametrize("settings", SCALINGS, ids=lambda settings: settings["type"])
def test_rotary_scaling_equals_transformers(settings: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    length, theta = 200, 500.0
    original = settings.get("original_max_seq_length", 64)
    rope = {**settings, "rope_type": settings["type"], "rope_theta": theta}
    rope["original_max_position_embeddings"] = rope.pop("original_max_seq_length", 64)
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=original, rope_parameters=rope
    )
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[settings["type"]](config, CPU, seq_len=length)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    positions = RotaryPositions(32, theta=theta, scaling=RopeScaling(**settings), max_length=original)
    cosine, sine = positions(length, CPU)
    torch.testing.assert_close(cosine, angles.cos() * magnitude, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(sine, angles.sin() * magnitude, atol=2e-5, rtol=1e-5)


def test_dynamic_scaling_leaves_short_sequences_alone() -> None:
    scaling = RopeScaling(type="dynamic", factor=2.0, original_max_seq_length=16)
    positions, plain = RotaryPositions(8, scaling=scaling), RotaryPositions(8)
    positions(40, CPU)
    torch.testing.assert_close(positions(16, CPU), plain(16, CPU))


def test_rotary_frequencies_of_old_files_spread_over_hidden_size() -> None:
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 4, "rotary_position_embedding": True}
    old, new = (build_rotary(ModelConfig(**sizes, rope_width=width)) for width in ("hidden", "head"))  # type: ignore[arg-type]
    assert old is not None
    assert new is not None
    torch.testing.assert_close(old(2, CPU)[0][1], torch.tensor([1.0, 10000 ** (-2 / 8)]).cos())
    torch.testing.assert_close(new(2, CPU)[0][1], torch.tensor([1.0, 10000 ** (-2 / 4)]).cos())
    assert build_rotary(ModelConfig(**sizes, relative_position_embedding=True)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_equals_transformers(bidirectional: bool) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    config = transformers.T5Config(
        d_model=16, num_heads=4, d_kv=4, relative_attention_num_buckets=32, is_decoder=not bidirectional
    )
    reference = T5Attention(config, has_relative_attention_bias=True)
    ours = RelativePositionBias(4, bidirectional=bidirectional)
    ours.load_state_dict({"relative_attention_bias.weight": reference.relative_attention_bias.weight})
    torch.testing.assert_close(ours(150, 170), reference.compute_bias(150, 170))
    torch.testing.assert_close(ours(3, 170, start=20), ours(150, 170)[:, :, 20:23])


def test_alibi_adds_slope_times_distance() -> None:
    segment_ids = torch.tensor([[1, 1, 1, 1, 0]])
    bias = AlibiBias(4)(segment_ids)
    expected = alibi_slopes(4)[:, None, None] * -(torch.arange(4)[:, None] - torch.arange(4)[None, :])
    torch.testing.assert_close(bias[0, :, :4, :4], expected)
    torch.testing.assert_close(AlibiBias(4)(segment_ids[:, :4], has_padding=False)[0], expected)


def test_standard_sinusoids_are_those_of_pegasus() -> None:
    pytest.importorskip("transformers")
    from transformers.models.pegasus.modeling_pegasus import PegasusSinusoidalPositionalEmbedding

    reference = PegasusSinusoidalPositionalEmbedding(30, 16)
    weight = reference.create_weight() if hasattr(reference, "create_weight") else reference.weight
    config = ModelConfig(emb_size=16, max_seq_length=4, sinusoid_layout="standard")
    segment_ids = torch.tensor([[1] * 25 + [0] * 5])
    ours = SinusoidalPositions(config, 9)(segment_ids, segment_ids)
    torch.testing.assert_close(ours[0], weight.detach(), atol=1e-5, rtol=1e-5)


def test_sinusoids_reach_beyond_the_table_and_survive_bfloat16() -> None:
    module = SinusoidalPositions(ModelConfig(emb_size=8, max_seq_length=4), 9)
    segment_ids = torch.ones(1, 20, dtype=torch.long)
    rows = module.bfloat16()(segment_ids, segment_ids)
    assert rows.dtype == torch.float32
    frequency = math.exp(-math.log(10000) / 3)
    assert float(rows[0, 19, 2]) == pytest.approx(math.sin(21 * frequency), abs=1e-5)
    torch.testing.assert_close(module(segment_ids[:, :5], segment_ids[:, :5], start=15), rows[:, 15:])


def test_pooling_of_padded_rows() -> None:
    hidden = torch.randn(2, 4, 3)
    segment_ids = torch.tensor([[1, 2, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(pool(hidden, segment_ids, "max")[0], hidden[0, :2].amax(0))
    for kind in ("mean", "max", "first", "last"):
        assert pool(hidden, segment_ids, kind).isfinite().all()  # type: ignore[arg-type]
    assert torch.equal(pool(hidden, segment_ids, "max", "segment"), pool(hidden, segment_ids, "max"))
