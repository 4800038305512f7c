"""Vocabulary files and special-token maps that are wrong get one clear sentence."""

from __future__ import annotations

import gzip
import json
import pickle
import zipfile
from pathlib import Path

import pytest

from tencentpretrain.errors import ConfigError, DataFormatError
from tencentpretrain.sniff import describe_file
from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer
from tencentpretrain.tokenizers.special_tokens import BUILT_IN_MAPS, read_special_token_names
from tencentpretrain.tokenizers.training import reserved_tokens
from tencentpretrain.tokenizers.vocabulary import read_vocabulary

MODELS = Path(__file__).resolve().parents[2] / "models"
HEAD = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 109540\n"

WRONG_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "lfs": (LFS, "a git-lfs pointer"),
    "html": (b"\n<!DOCTYPE html>\n<html><head></head></html>", "an HTML page"),
    "tokenizer_json": (
        b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE"}}',
        "a Hugging Face tokenizer.json",
    ),
    "config_json": (b'{"architectures": ["BertForMaskedLM"], "hidden_size": 8}', "a Hugging Face config"),
    "tokenizer_config": (b'{"tokenizer_class": "BertTokenizer"}', "a Hugging Face tokenizer_config.json"),
    "deepspeed": (b'{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {}}', "a DeepSpeed config"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "the index of a sharded checkpoint"),
    "json_vocab": (json.dumps({f"t{i}": i for i in range(200)}).encode(), "a JSON vocabulary"),
    "gzip": (gzip.compress(b"[PAD]\n", mtime=0), "a gzip archive"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle file"),
    "utf16": ("[PAD]\n".encode("utf-16"), "UTF-16 text"),
    "gbk": ("中国人民\n".encode("gb18030") * 9, "text that is not UTF-8 (it reads as GB18030/GBK)"),
    "binary": (b"abc\x00\x01\x02", "a binary file"),
    "safetensors": ((2).to_bytes(8, "little") + b"{}", "a safetensors file"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_foreign_files_are_named(name: str, tmp_path: Path) -> None:
    content, description = WRONG_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert (describe_file(path) or "").startswith(description)
    with pytest.raises(DataFormatError) as caught:
        build_tokenizer(TokenizerConfig(vocab_path=str(path)))
    assert str(path) in str(caught.value)
    assert description in str(caught.value)


def test_checkpoints_and_archives_are_told_apart(tmp_path: Path) -> None:
    for entry, description in (("model/data.pkl", "a PyTorch checkpoint"), ("readme.txt", "a zip archive")):
        path = tmp_path / "file.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(entry, b"x")
        assert describe_file(path) == description


@pytest.mark.parametrize(
    "text",
    ["[PAD]\n[UNK]\n", "{\n}\n", "\n\n", '{"emb_size": 8}', "中" * 50_000, "x" * 65_534 + "中国", "<html_like>\n"],
)
def test_plain_text_and_own_json_are_not_suspicious(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(text, encoding="utf-8")
    assert describe_file(path) is None


def test_missing_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_path: .*nowhere.txt does not exist"):
        build_tokenizer(TokenizerConfig(vocab_path=str(tmp_path / "nowhere.txt")))
    with pytest.raises(ConfigError, match=r"spm_model_path: .*does not exist"):
        build_tokenizer(TokenizerConfig(spm_model_path=str(tmp_path / "nowhere.model")))
    with pytest.raises(DataFormatError, match="a directory"):
        build_tokenizer(TokenizerConfig(vocab_path=str(tmp_path)))


def test_a_vocabulary_is_no_sentencepiece_model_and_the_other_way_round(tmp_path: Path) -> None:
    from tencentpretrain.tokenizers.training import TextSource, train_sentencepiece

    vocab = write(tmp_path / "vocab.txt", HEAD)
    with pytest.raises(DataFormatError, match="this is a text file"):
        build_tokenizer(TokenizerConfig(spm_model_path=vocab))
    source = TextSource(name="text", chunks=lambda: [["a cat sat on a mat"] * 5])
    model = train_sentencepiece(source, vocab_size=20, lower=False)
    (tmp_path / "spm.model").write_bytes(model)
    with pytest.raises(DataFormatError, match="pass it as --spm_model_path"):
        build_tokenizer(TokenizerConfig(vocab_path=str(tmp_path / "spm.model")))
    (tmp_path / "cut.model").write_bytes(model[: len(model) // 2])
    with pytest.raises(DataFormatError, match="not a usable SentencePiece model"):
        build_tokenizer(TokenizerConfig(spm_model_path=str(tmp_path / "cut.model")))


def write(path: Path, tokens: list[str]) -> str:
    """Writes a vocabulary and returns its path."""
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return str(path)


def test_vocabulary_lines(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes("\ufeff[PAD] 12\r\n\r\n的\t9\n\u2028\n##\u2028\na\u3000b\nlast".encode())
    assert read_vocabulary(str(path)) == ("[PAD]", "", "的", "\u2028", "##", "a", "last")


def test_duplicates_are_refused_with_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "vocab.txt", [*HEAD, "a", "b", "a"])
    with pytest.raises(DataFormatError, match="'a' on lines 6 and 8"):
        build_tokenizer(TokenizerConfig(vocab_path=path))


def test_a_late_bad_byte_is_given_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes("\n".join([*HEAD, *(f"token{i}" for i in range(20_000))]).encode() + b"\nbad\xff\n")
    with pytest.raises(DataFormatError, match=r"vocab.txt:20006: byte 0xff is not UTF-8"):
        build_tokenizer(TokenizerConfig(vocab_path=str(path)))


def test_shipped_maps_and_reserved_tokens_are_the_built_in_ones() -> None:
    for name, names in BUILT_IN_MAPS.items():
        assert (MODELS / name).is_file()
        assert read_special_token_names(str(MODELS / name)) == names
        assert read_special_token_names(f"elsewhere/{name}") == names
    lines = (MODELS / "reserved_vocab.txt").read_text(encoding="utf-8").split("\n")
    assert lines == [*reserved_tokens(), ""]
    assert len(reserved_tokens()) == 104


@pytest.mark.parametrize(
    ("tokens", "ids"),
    [
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "<pad>"], (0, 1, 2, 3, 4)),
        (["<s>", "<pad>", "</s>", "<unk>", "a", "<mask>"], (1, 3, 0, 2, 5)),
        (["<unk>", "<s>", "</s>", "<0x00>", "a"], (3, 0, 1, 2, None)),
    ],
)
def test_maps_are_found_from_the_vocabulary(tokens: list[str], ids: tuple[int | None, ...], tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(vocab_path=write(tmp_path / "vocab.txt", tokens)))
    special = tokenizer.special
    assert (special.pad_id, special.unk_id, special.cls_id, special.sep_id, special.mask_id) == ids
    if ids[-1] is None:
        with pytest.raises(ConfigError, match="no mask token '<mask>'"):
            _ = tokenizer.mask_id


def test_a_missing_special_token_is_named_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "vocab.txt", ["[PAD]", "[CLS]", "a"])
    with pytest.raises(ConfigError) as caught:
        build_tokenizer(TokenizerConfig(vocab_path=path))
    assert path in str(caught.value)
    assert "unk_token '[UNK]'" in str(caught.value)
    assert "sep_token '[SEP]'" in str(caught.value)
    with pytest.raises(ConfigError, match="--special_tokens_map"):
        build_tokenizer(TokenizerConfig(vocab_path=write(tmp_path / "bare.txt", ["a", "b"])))


def test_maps_of_users(tmp_path: Path) -> None:
    vocab = write(tmp_path / "vocab.txt", ["a", "<|endoftext|>", "b"])
    path = tmp_path / "map.json"

    def build(content: object) -> tuple[int, ...]:
        path.write_text(json.dumps(content), encoding="utf-8")
        config = TokenizerConfig(vocab_path=vocab, special_tokens_map=str(path))
        return build_tokenizer(config).special.ids()

    one = "<|endoftext|>"
    assert build({"pad_token": one, "unk_token": one, "cls_token": one, "sep_token": one}) == (1,)
    foreign = {"bos_token": {"content": "a"}, "eos_token": "b", "unk_token": one, "pad_token": one}
    assert build({**foreign, "additional_special_tokens": []}) == (1, 0, 2)
    with pytest.raises(ConfigError, match="did you mean 'pad_token'"):
        build({"pad_tokn": one, "unk_token": one, "cls_token": one, "sep_token": one})
    with pytest.raises(ConfigError, match="must be a string"):
        build({"pad_token": 3, "unk_token": one, "cls_token": one, "sep_token": one})
    path.write_text("[1, 2", encoding="utf-8")
    with pytest.raises(DataFormatError, match="JSON object"):
        read_special_token_names(str(path))
    with pytest.raises(ConfigError, match="does not exist"):
        read_special_token_names(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ("#version: 0.2\na b\n", "'ab' is not in the vocabulary"),
        ("#version: 0.2\na b c\n", "merges.txt:2: a merge is two"),
    ],
)
def test_merges_that_do_not_fit(merges: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    vocab = write(tmp_path / "vocab.txt", [*HEAD, "a", "b"])
    config = TokenizerConfig(tokenizer="bpe", vocab_path=vocab, merges_path=str(tmp_path / "merges.txt"))
    with pytest.raises(DataFormatError, match=message):
        build_tokenizer(config)


def test_a_folder_without_a_hugging_face_tokenizer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(DataFormatError, match="hfpretrained"):
        build_tokenizer(TokenizerConfig(tokenizer="hfpretrained", vocab_path=str(tmp_path)))
