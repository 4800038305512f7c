"""The model files: all there, all readable, holding what was published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tencentpretrain.config import load_config
from tencentpretrain.config.export import model_to_published
from tencentpretrain.config.loading import config_from_values
from tencentpretrain.errors import ConfigError

MODELS = Path(__file__).resolve().parents[2] / "models"

# family -> {file: emb/feed-forward/hidden/heads/layers[/decoder layers]}; "-" where a model has no such size.
PUBLISHED = {
    "albert": {"base": "128/3072/768/12/12", "large": "128/4096/1024/16/24", "xlarge": "128/8192/2048/16/24",
               "xxlarge": "128/16384/4096/16/12"},
    "bart": {"base": "768/3072/768/12/6/6", "large": "1024/4096/1024/16/12/12"},
    "beit": {"base": "768/3072/768/12/12"},
    "bert": {"tiny": "128/512/128/2/2", "mini": "256/1024/256/4/4", "small": "512/2048/512/8/4",
             "medium": "512/2048/512/8/8", "base": "768/3072/768/12/12", "large": "1024/4096/1024/16/24",
             "xlarge": "1536/6144/1536/24/36"},
    "bloom": {"1b1": "1536/6144/1536/16/24", "7b1": "4096/16384/4096/32/30", "175b": "14336/57344/14336/112/70"},
    "clip": {"base-16-224": "", "base-32-224": ""},
    "cnn": {"gatedcnn_9": "128/-/807/-/9", "gatedcnn_13": "128/-/1268/-/13"},
    "dall-e": {"base": "768/3072/768/12/12"},
    "gpt2": {"": "768/3072/768/12/12", "distil": "768/3072/768/12/6", "medium": "1024/4096/1024/16/24",
             "large": "1280/5120/1280/20/36", "xlarge": "1600/6400/1600/25/48"},
    "llama": {"7b": "4096/11008/4096/32/32", "13b": "5120/13824/5120/40/40", "33b": "6656/17920/6656/52/60",
              "65b": "8192/22016/8192/64/80"},
    "llama2": {"7b": "4096/11008/4096/32/32", "13b": "5120/13824/5120/40/40", "70b": "8192/28672/8192/64/80"},
    "megatron": {"bert_3.9B": "2560/10240/2560/40/48", "gpt2_8.3B": "3072/12288/3072/24/72"},
    "pegasus": {"base": "768/3072/768/12/12/12", "large": "1024/4096/1024/16/16/16"},
    "rnn": {"bilstm": "512/-/1536/-/2", "lstm": "512/-/512/-/2", "gru": "512/-/512/-/2", "siamese_lstm": ""},
    "s2t": {"small": "256/2048/256/4/12/6", "medium": "512/2048/512/8/12/6", "large": "1024/4096/1024/16/12/6"},
    "sbert": {"base": "", "large": ""},
    "t5": {"small": "512/2048/512/8/6/6", "base": "768/3072/768/12/12/12", "large": "1024/4096/1024/16/24/24",
           "3b": "1024/16384/1024/32/24/24", "11b": "1024/65536/1024/128/24/24"},
    "t5-v1_1": {"small": "512/1024/512/6/8/8", "base": "768/2048/768/12/12/12", "large": "1024/2816/1024/16/24/24",
                "xlarge": "2048/5120/2048/32/24/24", "xxlarge": "4096/10240/4096/64/24/24"},
    "talk2face": {"base": "768/3072/768/12/12"},
    "transformer": {"base": "512/2048/512/8/6/6", "big": "1024/4096/1024/16/6/6"},
    "vilt": {"base": "768/3072/768/12/12"},
    "vit": {"base-16-224": "768/3072/768/12/12", "base-32-224": "768/3072/768/12/12",
            "large-16-224": "1024/4096/1024/16/24", "large-32-224": "1024/4096/1024/16/24",
            "huge-14-224": "1280/5120/1280/16/32"},
    "xlm-roberta": {"base": "768/3072/768/12/12", "large": "1024/4096/1024/16/24"},
}  # fmt: skip
NOT_YET = {"beit", "clip", "s2t", "vilt", "vit"}
SIZE_KEYS = ("emb_size", "feedforward_size", "hidden_size", "heads_num", "layers_num", "decoder_layers_num")


def published_files() -> list[tuple[str, str, str]]:
    return [
        (family, f"{size}_config.json" if size else "config.json", sizes)
        for family, files in PUBLISHED.items()
        for size, sizes in files.items()
    ]


def read(path: str) -> dict[str, object]:
    values: dict[str, object] = json.loads((MODELS / path).read_text(encoding="utf-8"))
    return values


def test_there_are_68() -> None:
    assert len(published_files()) == 68


@pytest.mark.parametrize(("family", "name", "sizes"), published_files())
def test_published_sizes(family: str, name: str, sizes: str) -> None:
    values = read(f"{family}/{name}")
    for key, size in zip(SIZE_KEYS, sizes.split("/") if sizes else [], strict=False):
        assert values.get(key) == (None if size == "-" else int(size)), key


@pytest.mark.parametrize(
    "path", sorted(MODELS.glob("*/*config.json")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_every_file_decodes(path: Path) -> None:
    if path.parent.name in NOT_YET:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert all("which this version does not have yet" in problem for problem in caught.value.problems)
        return
    config = load_config(path)
    again = config_from_values(model_to_published(config))
    assert again == config, "what is exported reads back as the same model"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("albert/base", {"hidden_act": "relu", "dropout": 0.0, "parameter_sharing": True, "target": ["mlm", "sp"]}),
        ("bart/base", {"max_seq_length": 1024, "has_lmtarget_bias": True, "share_embedding": True}),
        ("beit/base", {"tokenizer": "vqgan", "embedding": ["masked_patch", "pos"], "image_preprocess": ["crop"]}),
        ("cnn/gatedcnn_9", {"kernel_size": 4, "block_size": 2, "encoder": "gatedcnn"}),
        ("dall-e/base", {"mask": "prefix", "tokenizer": "multimodal"}),
        ("gpt2/distil", {"hidden_act": "gelu_fast", "mask": "causal", "layernorm_positioning": "pre"}),
        ("llama/7b", {"layernorm": "rms", "feed_forward": "gated", "max_seq_length": 2048}),
        ("llama2/70b", {"local_kv_heads_num": 8, "max_seq_length": 2048}),
        ("llama2/70b_original", {"local_kv_heads_num": 8, "max_seq_length": 4096, "layernorm_eps": 1e-5}),
        ("pegasus/large", {"embedding": ["word", "sinusoidalpos"], "data_processor": "gsg"}),
        ("s2t/small", {"conv_channels": [1024, 512], "label_smoothing": 0.1, "scheduler": "inverse_sqrt"}),
        ("t5/3b", {"attention_head_size": 128, "tie_weights": True, "remove_attention_scale": True}),
        ("talk2face/base", {"seq_length": 334, "mask": "prefix"}),
        ("transformer/big", {"dropout": 0.3, "data_processor": "mt"}),
        ("vit/huge-14-224", {"patch_size": 14, "max_seq_length": 257, "image_height": 224}),
        ("xlm-roberta/base", {"max_seq_length": 514, "target": ["mlm"]}),
        ("qwen3/8b", {"qk_norm": True, "attention_head_size": 128, "local_kv_heads_num": 8}),
        ("mistral/7b", {"sliding_window": 4096, "local_kv_heads_num": 8}),
    ],
)
def test_published_values(path: str, expected: dict[str, object]) -> None:
    values = read(f"{path}_config.json")
    assert {key: values.get(key) for key in expected} == expected


def test_untied_files_do_not_tie() -> None:
    for path in ("t5-v1_1/base", "xlm-roberta/base", "megatron/bert_3.9B", "llama/7b"):
        assert "tie_weights" not in read(f"{path}_config.json")


def test_old_bloom_has_no_positions_and_the_corrected_one_has() -> None:
    assert not load_config("models/bloom/1b1_config.json").alibi_position_embedding
    corrected = load_config("models/bloom/1b1_alibi_config.json")
    assert corrected.alibi_position_embedding
    assert corrected.embedding_layernorm
    assert corrected.layernorm_form == "standard"


def test_streams_hold_the_outer_settings() -> None:
    config = load_config("models/sbert/base_config.json")
    assert config.streams is not None
    assert [stream.dropout for stream in config.streams] == [0.1, 0.1]
    assert [stream.embedding for stream in config.streams] == [("word", "pos", "seg")] * 2
    assert config.embedding == ("dual",)
