"""Token ids against records of the published toolkit and the vectors of its specification."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tencentpretrain.parity.tokenizers import check
from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer
from tencentpretrain.tokenizers.wordpiece import WordPieceTokenizer

TEXT = "I love  TencentPretrain 2.0, 你好\tÀé!"


def test_every_recorded_string_has_its_ids(shared: Path) -> None:
    results = check(shared / "parity" / "tokenizers", shared / "data" / "vocab")
    assert len(results) == 12
    assert [result for result in results if not result.passed] == []


def test_a_changed_id_is_noticed(shared: Path, tmp_path: Path) -> None:
    record = json.loads((shared / "parity" / "tokenizers" / "char_google_zh.json").read_text(encoding="utf-8"))
    record["cases"][5]["ids"][0] += 1
    (tmp_path / "changed.json").write_text(json.dumps(record), encoding="utf-8")
    (result,) = check(tmp_path / "changed.json", shared / "data" / "vocab")
    assert not result.passed
    assert result.deviation == 1
    (absent,) = check(tmp_path / "changed.json", tmp_path)
    assert not absent.passed
    assert "does not exist" in absent.detail


@pytest.mark.parametrize(
    ("flags", "text", "tokens", "ids"),
    [
        (
            {},
            TEXT,
            "i love te ##nce ##nt ##pr ##et ##rain 2 . 0 , 你 好 ae !",
            "151 8451 8282 9056 8511 11426 8418 11944 123 119 121 117 872 1962 11978 106",
        ),
        (
            {"do_lower_case": "false"},
            TEXT,
            "[UNK] love [UNK] 2 . 0 , 你 好 [UNK] !",
            "100 8451 100 123 119 121 117 872 1962 100 106",
        ),
        (
            {},
            "[CLS] unaffable [MASK]",
            "[ cl ##s ] u ##na ##ff ##able [ ma ##sk ]",
            "138 12847 8118 140 163 8374 9049 9609 138 9622 8998 140",
        ),
        ({}, "x" * 201, "[UNK]", "100"),
        ({"tokenizer": "space"}, TEXT, "[UNK] love [UNK] [UNK] [UNK] [UNK]", "100 8451 100 100 100 100"),
    ],
)
def test_specification_vectors(shared: Path, flags: dict[str, str], text: str, tokens: str, ids: str) -> None:
    vocabulary = shared / "data" / "vocab" / "google_zh_vocab.txt"
    tokenizer = build_tokenizer(TokenizerConfig(vocab_path=str(vocabulary), **flags))
    assert tokenizer.tokenize(text) == tokens.split()
    assert tokenizer.encode(text) == [int(index) for index in ids.split()]


def test_specification_vector_of_bpe(shared: Path) -> None:
    folder = shared / "data" / "vocab"
    tokenizer = build_tokenizer(
        TokenizerConfig(
            tokenizer="bpe",
            vocab_path=str(folder / "huggingface_gpt2_vocab.txt"),
            merges_path=str(folder / "huggingface_gpt2_merges.txt"),
        )
    )
    ids = "100 657 1437 4527 6342 510 4903 9946 132 4 288 6 1437 47856 21402 48975 10809 328"
    assert tokenizer.encode("I love  TencentPretrain 2.0, 你好!") == [int(index) for index in ids.split()]
    # The published file has RoBERTa's order despite its name, and its special tokens are found from that.
    assert (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.mask_id == 50264


@pytest.mark.parametrize("corpus", ["CLUECorpusSmall_sampled.txt", "book_review_cls.txt"])
def test_bulk_lookup_equals_the_plain_path_on_real_text(shared: Path, corpus: str) -> None:
    vocabulary = shared / "data" / "vocab" / "google_zh_vocab.txt"
    tokenizer = build_tokenizer(TokenizerConfig(vocab_path=str(vocabulary)))
    assert isinstance(tokenizer, WordPieceTokenizer)
    lines = (shared / "data" / "corpora" / corpus).read_text(encoding="utf-8").split("\n")[:400]
    assert [row.tolist() for row in tokenizer.encode_batch(lines)] == [tokenizer.encode_plain(line) for line in lines]
