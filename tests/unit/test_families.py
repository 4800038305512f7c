"""Tables of model families: every name has a place, every tensor comes back bit for bit."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tencentpretrain.checkpoint.family import Family
from tencentpretrain.checkpoint.rules import Chunk, DropRows, Interleave, PadRows, Transpose
from tencentpretrain.config.loading import config_from_values
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.errors import CheckpointMismatch, ConfigError
from tencentpretrain.model import build_model
from tencentpretrain.registry import FAMILIES

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
}
T5 = {"model_type": "t5", "d_model": 4, "d_ff": 8, "d_kv": 2, "num_heads": 2, "num_layers": 1}


def llama_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"model.embed_tokens.weight": (20, 8), "model.norm.weight": (8,), "lm_head.weight": (20, 8)}
    for layer in range(2):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (8, 8),
                "self_attn.k_proj": (4, 8),
                "self_attn.v_proj": (4, 8),
                "self_attn.o_proj": (8, 8),
                "mlp.gate_proj": (12, 8),
                "mlp.up_proj": (12, 8),
                "mlp.down_proj": (8, 12),
                "input_layernorm": (8,),
                "post_attention_layernorm": (8,),
            }.items()
        }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def bert_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (10, 4),
        "bert.embeddings.position_embeddings.weight": (16, 4),
        "bert.embeddings.token_type_embeddings.weight": (2, 4),
    }
    dense = {"cls.predictions.transform.dense": (4, 4), "bert.pooler.dense": (4, 4), "cls.seq_relationship": (2, 4)}
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    for layer in range(2):
        block = f"bert.encoder.layer.{layer}."
        dense |= {f"{block}attention.self.{part}": (4, 4) for part in ("query", "key", "value")}
        dense |= {f"{block}attention.output.dense": (4, 4)}
        dense |= {f"{block}intermediate.dense": (8, 4), f"{block}output.dense": (4, 8)}
        norms += [f"{block}attention.output.LayerNorm", f"{block}output.LayerNorm"]
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (4,), f"{name}.bias": (4,)}
    shapes |= {"cls.predictions.bias": (10,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def family(name: str) -> Family:
    return FAMILIES.get(name)


@pytest.mark.parametrize("name", FAMILIES.names())
def test_every_registered_family_loads(name: str) -> None:
    assert isinstance(family(name), Family)


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (Transpose(("a",), "t"), (6, 4)),
        (Transpose(("a", "b", "c"), "t"), (4, 12)),
        (Chunk(("a", "b", "c"), "t"), (12,)),
        (PadRows(("a",), "t", first=1), (3, 4)),
        (Interleave(("a",), "t"), (16, 5)),
        (Interleave(("a",), "t"), (16,)),
        (Interleave(("a",), "t"), (8,)),
    ],
)
def test_a_rule_is_undone_by_its_inverse(rule: object, shape: tuple[int, ...]) -> None:
    config = ModelConfig(hidden_size=16, num_heads=2)
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    parts = rule.read(tensor, config)
    assert len(parts) == len(rule.ours)
    assert torch.equal(rule.write(parts, config), tensor)


def test_rows_for_rotation_follow_the_published_formula() -> None:
    heads, width = 3, 4
    rows = torch.arange(heads * width)
    (ours,) = Interleave(("a",), "t").read(rows, ModelConfig(head_dim=width, hidden_size=99, num_heads=7))
    for head in range(heads):
        for pair in range(width // 2):
            for c in (0, 1):
                assert ours[head * width + 2 * pair + c] == head * width + c * width // 2 + pair


def test_dropped_rows_come_back_as_zeros() -> None:
    rule = DropRows(("a",), "t", first=2)
    (table,) = rule.read(torch.ones(5, 3), ModelConfig())
    assert table.shape == (3, 3)
    assert rule.write([table], ModelConfig()).tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 3


def test_grouped_heads_keep_their_shape_and_place() -> None:
    theirs = llama_tensors()
    config, ours = family("llama").to_ours(LLAMA, theirs)
    assert config["local_kv_heads_num"] == 1
    key = theirs["model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(ours["encoder.transformer.1.self_attn.linear_layers.1.weight"], key[[0, 2, 1, 3]])
    query = theirs["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(ours["encoder.transformer.1.self_attn.linear_layers.0.weight"], query[[0, 2, 1, 3, 4, 6, 5, 7]])
    back = family("llama").to_theirs(config, ours)
    assert {name: tensor.tolist() for name, tensor in back.items()} == {n: t.tolist() for n, t in theirs.items()}


def test_a_tensor_is_read_only_when_it_is_asked_for() -> None:
    class Counting(dict[str, Tensor]):
        reads: list[str] = []  # noqa: RUF012

        def __getitem__(self, name: str) -> Tensor:
            self.reads.append(name)
            return super().__getitem__(name)

    theirs = Counting(llama_tensors())
    _, ours = family("llama").to_ours(LLAMA, theirs)
    assert theirs.reads == []
    ours["encoder.layer_norm.weight"]
    assert theirs.reads == ["model.norm.weight"]


def test_leftover_and_missing_names_are_all_listed() -> None:
    theirs = llama_tensors()
    del theirs["model.layers.1.mlp.up_proj.weight"], theirs["model.norm.weight"]
    theirs |= {"model.layers.2.mlp.up_proj.weight": torch.ones(1), "model.vision.weight": torch.ones(1)}
    with pytest.raises(CheckpointMismatch) as error:
        family("llama").to_ours(LLAMA, theirs)
    text = str(error.value)
    assert re.search(r"without a place.* \(2\): model.layers.2.mlp.up_proj.weight, model.vision.weight", text)
    assert re.search(r"missing \(2\): ", text)
    assert "model.layers.1.mlp.up_proj.weight" in text
    assert "model.norm.weight" in text


def test_a_bias_that_only_one_layer_has_is_missed_in_the_others() -> None:
    theirs = llama_tensors() | {"model.layers.0.self_attn.q_proj.bias": torch.ones(8)}
    with pytest.raises(CheckpointMismatch, match=r"model\.layers\.1\.self_attn\.q_proj\.bias"):
        family("llama").to_ours(LLAMA, theirs)


def test_our_leftover_and_missing_names_are_listed_too() -> None:
    config, ours = family("llama").to_ours(LLAMA, llama_tensors())
    changed = dict(ours) | {"target.mlm.linear_1.weight": torch.ones(1)}
    del changed["encoder.transformer.0.layer_norm_2.weight"]
    with pytest.raises(CheckpointMismatch) as error:
        family("llama").to_theirs(config, changed)
    assert "target.mlm.linear_1.weight" in str(error.value)
    assert "missing (1): encoder.transformer.0.layer_norm_2.weight" in str(error.value)


def test_old_names_of_norms_and_bare_bodies_are_read() -> None:
    new = bert_tensors()
    old = {
        re.sub(r"LayerNorm\.weight", "LayerNorm.gamma", re.sub(r"LayerNorm\.bias", "LayerNorm.beta", name)): tensor
        for name, tensor in new.items()
    }
    _, ours = family("bert").to_ours(BERT, old)
    assert torch.equal(
        ours["encoder.transformer.1.layer_norm_2.beta"], new["bert.encoder.layer.1.output.LayerNorm.bias"]
    )
    body = {name.removeprefix("bert."): tensor for name, tensor in new.items() if name.startswith("bert.")}
    config, ours = family("bert").to_ours(BERT, body)
    assert config["target"] == ["mlm"]
    assert torch.equal(ours["embedding.pos.embedding.weight"], new["bert.embeddings.position_embeddings.weight"])
    assert "target.sp.linear_1.weight" in ours
    assert not any(name.startswith("target.mlm.linear_1") for name in ours)


def test_segment_table_begins_with_a_row_for_padding() -> None:
    theirs = bert_tensors()
    _, ours = family("bert").to_ours(BERT, theirs)
    table = ours["embedding.seg.embedding.weight"]
    assert not table[0].any()
    assert torch.equal(table[1:], theirs["bert.embeddings.token_type_embeddings.weight"])


def test_a_head_missing_from_a_tied_file_is_the_word_table() -> None:
    theirs = bert_tensors()
    config, ours = family("bert").to_ours(BERT, theirs)
    assert config["tie_weights"]
    assert torch.equal(ours["target.mlm.linear_2.weight"], theirs["bert.embeddings.word_embeddings.weight"])
    back = family("bert").to_theirs(config, ours)
    assert set(back) == {*theirs, "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    del theirs["cls.seq_relationship.weight"], theirs["cls.seq_relationship.bias"]
    config, _ = family("bert").to_ours(BERT, theirs)
    assert config["target"] == ["mlm"]


def test_a_file_without_the_mlm_head_gets_no_part_of_it() -> None:
    theirs = {name: tensor for name, tensor in bert_tensors().items() if not name.startswith("cls.predictions.")}
    config, ours = family("bert").to_ours(BERT, theirs)
    assert config["target"] == ["sp"]
    model = build_model(config_from_values(config), 10)
    assert set(ours) == set(model.state_dict())
    assert set(family("bert").to_theirs(config, ours)) == set(theirs)


def test_a_head_that_differs_from_the_table_stays_its_own() -> None:
    theirs = bert_tensors() | {"cls.predictions.decoder.weight": torch.ones(10, 4)}
    config, ours = family("bert").to_ours(BERT, theirs)
    assert config["tie_weights"] is False
    assert ours["target.mlm.linear_2.weight"].eq(1).all()


def test_an_untied_file_without_its_head_is_refused() -> None:
    theirs = llama_tensors()
    del theirs["lm_head.weight"]
    with pytest.raises(CheckpointMismatch, match=r"missing .*lm_head\.weight"):
        family("llama").to_ours(LLAMA, theirs)
    config, ours = family("llama").to_ours({**LLAMA, "tie_word_embeddings": True}, theirs)
    assert config["tie_weights"]
    assert torch.equal(ours["target.lm.output_layer.weight"], theirs["model.embed_tokens.weight"])


def test_copies_of_one_tensor_that_differ_are_refused() -> None:
    theirs = bert_tensors() | {"cls.predictions.decoder.bias": torch.ones(10)}
    with pytest.raises(CheckpointMismatch, match="are one tensor in a Hugging Face bert model, but differ"):
        family("bert").to_ours(BERT, theirs)


def test_tables_that_theirs_shares_must_be_equal_on_the_way_out() -> None:
    config = family("t5").config({**T5, "model_type": "t5"}, frozenset())
    model = build_model(config_from_values(config), 9, seed=0)
    theirs = family("t5").to_theirs(config, model.state_dict())
    assert torch.equal(theirs["shared.weight"], model.state_dict()["embedding.word.embedding.weight"])
    apart = {**model.state_dict(), "tgt_embedding.word.embedding.weight": torch.ones(9, 4)}
    with pytest.raises(CheckpointMismatch, match=r"encoder\.embed_tokens\.weight and decoder\..* are one tensor"):
        family("t5").to_theirs(config, apart)


def test_buffers_are_passed_over() -> None:
    theirs = llama_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    _, ours = family("llama").to_ours(LLAMA, theirs)
    assert not any("inv_freq" in name for name in ours)


def test_all_problems_of_a_config_are_reported_at_once() -> None:
    bad = {**LLAMA, "hidden_act": "mish", "rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0]}}
    del bad["intermediate_size"]
    with pytest.raises(ConfigError) as error:
        family("llama").to_ours(bad, llama_tensors())
    assert len(error.value.problems) == 4
    assert "mish" in str(error.value)
    assert "intermediate_size" in str(error.value)
    assert "short_factor" in str(error.value)


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4},
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        (
            {
                "rope_parameters": {
                    "rope_theta": 5e5,
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_seq_length": 8192,
                },
            },
        ),
    ],
)
def test_both_spellings_of_rotary_settings_are_read(spelling: dict[str, object], expected: dict[str, object]) -> None:
    config, _ = family("llama").to_ours({**LLAMA, **spelling}, llama_tensors())
    assert config.get("rope_scaling") == expected.get("rope_scaling")
    assert config["rope_theta"] == expected["rope_theta"]


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 4}, None),
        ({"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2}, 4),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, None),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, 4),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, ConfigError),
    ],
)
def test_windows_of_qwen2(settings: dict[str, object], window: object) -> None:
    if window is ConfigError:
        with pytest.raises(ConfigError, match="some layers only"):
            family("qwen2").to_ours({**LLAMA, "model_type": "qwen2", **settings}, llama_tensors())
    else:
        config, _ = family("qwen2").to_ours({**LLAMA, "model_type": "qwen2", **settings}, llama_tensors())
        assert config.get("sliding_window") == window


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"hidden_act": "relu", "feed_forward": "dense", "tie_weights": True, "lm_scale": True}),
        (
            {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
            {"hidden_act": "gelu_fast", "feed_forward": "gated", "tie_weights": False, "lm_scale": False},
        ),
        (
            {"feed_forward_proj": "gated-silu", "tie_word_embeddings": True, "scale_decoder_outputs": False},
            {"hidden_act": "silu", "feed_forward": "gated", "tie_weights": True, "lm_scale": False},
        ),
    ],
)
def test_variants_of_t5(settings: dict[str, object], expected: dict[str, object]) -> None:
    config = family("t5").config({**T5, **settings}, frozenset())
    assert {key: config[key] for key in expected} == expected


def test_a_config_of_another_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="describes a bert model, but is read as llama"):
        family("llama").to_ours({**LLAMA, "model_type": "bert"}, llama_tensors())
    with pytest.raises(ConfigError, match="unknown model family 'roberta'"):
        family("bert").to_ours({**BERT, "model_type": "roberta"}, bert_tensors())
    settings = {**LLAMA, "model_type": "qwen2"}
    assert family("qwen2").to_ours(settings, llama_tensors())[0]["qkv_bias"] is True


def test_a_shape_that_cannot_be_cut_is_named() -> None:
    theirs = llama_tensors() | {"model.layers.0.self_attn.q_proj.weight": torch.ones(7, 8)}
    _, ours = family("llama").to_ours(LLAMA, theirs)
    with pytest.raises(CheckpointMismatch, match=r"layers\.0\.self_attn\.q_proj\.weight has shape \[7, 8\]"):
        ours["encoder.transformer.0.self_attn.linear_layers.0.weight"]


def test_values_keep_their_format() -> None:
    theirs = {name: tensor.bfloat16() for name, tensor in llama_tensors().items()}
    config, ours = family("llama").to_ours(LLAMA, theirs)
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    back = family("llama").to_theirs(config, ours)
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())
