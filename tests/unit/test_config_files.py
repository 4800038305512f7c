"""Files given as a config that are none, and configs found from anywhere."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tencentpretrain.config import load_config
from tencentpretrain.errors import ConfigError


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 768},
            "Hugging Face config (BertForMaskedLM)",
        ),
        ({"model_type": "llama", "num_hidden_layers": 2}, "Hugging Face config (llama)"),
        ({"train_batch_size": 8, "zero_optimization": {"stage": 2}}, "belongs to --deepspeed_config"),
        ({"train_micro_batch_size_per_gpu": 1}, "belongs to --deepspeed_config"),
        (
            {"version": "1.0", "added_tokens": [], "model": {"type": "BPE"}},
            "belongs to --vocab_path with --tokenizer hfpretrained",
        ),
        ({"tokenizer_class": "BertTokenizer"}, "tokenizer_config.json"),
        ({"metadata": {}, "weight_map": {"a": "b"}}, "index of a sharded checkpoint"),
        ({"cls_token": "[CLS]", "sep_token": "[SEP]"}, "belongs to --special_tokens_map"),
        ({"B-PER": 0, "I-PER": 1, "O": 2}, "belongs to --label2id_path"),
        ({f"token{i}": i for i in range(200)}, "JSON vocabulary"),
        ({"peft_type": "LORA", "r": 8}, "PEFT adapter config"),
        ([1, 2], "holds a JSON list"),
        ("text", "holds a JSON string"),
        (3, "holds a JSON number"),
        (None, "holds a JSON null"),
    ],
)
def test_foreign_json(tmp_path: Path, content: Any, expected: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        (gzip.compress(b"{}", mtime=0), "gzip archive"),
        (b"\x80\x02}q\x00.", "pickle file, not a config; weights belong to --pretrained_model_path"),
        ((8).to_bytes(8, "little") + b'{"a": 1}' + bytes(8), "safetensors file, not a config; weights belong to"),
        (b'{"a": 1,\n "b" 2}', "line 2, column 6: not valid JSON"),
        (b'{"a": NaN}', "NaN is not a number that JSON knows"),
        ('{"a": "é"}'.encode("latin-1"), "not UTF-8"),
        (b"[UNK]\n[CLS]\n", "not valid JSON"),
        (b"\x00\x01\x02\x03" * 50, "binary file"),
    ],
)
def test_files_that_are_no_json(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)


def test_checkpoint_zip(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    with pytest.raises(
        ConfigError, match="PyTorch checkpoint, not a config; weights belong to --pretrained_model_path"
    ):
        load_config(path)


def test_missing_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such config file"):
        load_config(tmp_path / "nothing.json")
    with pytest.raises(ConfigError, match="a directory, not a config; give the JSON file inside it"):
        load_config(tmp_path)


def test_byte_order_mark_is_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    text = Path(__file__).resolve().parents[2].joinpath("models/bert/tiny_config.json").read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8-sig")
    assert load_config(path).num_layers == 2


def test_shipped_files_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("models/bert/base_config.json").num_layers == 12
    (tmp_path / "models/bert").mkdir(parents=True)
    (tmp_path / "models/bert/base_config.json").write_text(
        json.dumps({"emb_size": 8, "hidden_size": 8, "layers_num": 1, "encoder": "lstm", "target": "lm"}),
        encoding="utf-8",
    )
    assert load_config("models/bert/base_config.json").num_layers == 1, "the working directory comes first"
