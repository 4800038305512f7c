"""Every kind of tokenizer on vocabularies small enough to read."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import TOKENIZERS
from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer
from tencentpretrain.tokenizers.base import CHUNK_CHARS, Tokenizer
from tencentpretrain.tokenizers.bpe import BpeTokenizer
from tencentpretrain.tokenizers.training import TextSource, train_bpe, train_sentencepiece
from tencentpretrain.tokenizers.wordpiece import WordPieceTokenizer

SPECIAL = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTINELS = ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
PIECES = [
    *"abcdehilmnorstuxyz中国人,.!'1",
    "##a",
    "##b",
    "##c",
    "##e",
    "##s",
    "##國",
    "##ς",
    "##σ",
    "σ",
    "ab",
    "he",
    "##llo",
]
VOCABULARY = [*SPECIAL, *PIECES, *SENTINELS]
TEXT = "the cat sat on the mat, and the cats' hats weren't there. It's 2023: we're 12 cats!  你好 世界\n"

mixed_text = st.text(
    st.sampled_from(list("abehlos AB中国,.!'1 \t\n\r\x00\x1c\u200b\u00a0\u3000\u2028éÉΣσςİ\u0301한龍豈\ud800😀"))
)
any_text = st.one_of(mixed_text, st.text())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vocabulary, merges and SentencePiece model."""
    folder = tmp_path_factory.mktemp("vocabularies")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    source = TextSource(name="text", chunks=lambda: iter([[TEXT] * 20]))
    tokens, merges = train_bpe(source, vocab_size=420, min_count=1, lower=False)
    (folder / "bpe.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    (folder / "spm.model").write_bytes(train_sentencepiece(source, vocab_size=80, lower=False))
    return folder


def config(kind: str, folder: Path, **changes: object) -> TokenizerConfig:
    """The smallest configuration of a kind."""
    vocab = {"vocab_path": str(folder / "vocab.txt")}
    files: dict[str, dict[str, str]] = {
        "bpe": {"vocab_path": str(folder / "bpe.txt"), "merges_path": str(folder / "merges.txt")},
        "xlmroberta": {"spm_model_path": str(folder / "spm.model")},
        "hfpretrained": {"vocab_path": str(folder / "hf")},
        "virtual": {},
    }
    return TokenizerConfig(**{"tokenizer": kind, **files.get(kind, vocab), **changes})


@pytest.fixture(scope="session")
def tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """One tokenizer of every registered kind, `virtual` excepted, and `bert` on SentencePiece."""
    transformers = pytest.importorskip("transformers")
    rust = build_tokenizer(config("bpe", folder))._rust  # type: ignore[attr-defined]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=rust, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder / "hf")
    built = {kind: build_tokenizer(config(kind, folder)) for kind in TOKENIZERS.names() if kind != "virtual"}
    built["bert on SentencePiece"] = build_tokenizer(TokenizerConfig(spm_model_path=str(folder / "spm.model")))
    return built


def test_the_promised_kinds_are_registered() -> None:
    assert {"bert", "bpe", "char", "space", "xlmroberta", "virtual", "hfpretrained"} <= set(TOKENIZERS.names())


def test_every_kind_keeps_the_common_promises(tokenizers: dict[str, Tokenizer]) -> None:
    texts = ["", " ", TEXT, "中国 abc", "a\x00b\u200bc", "x" * 300, "[CLS] [MASK]", "\ud800 half a pair"]
    for kind, tokenizer in tokenizers.items():
        ids, offsets = tokenizer.encode_packed(texts)
        assert ids.dtype == np.uint32, kind
        assert offsets.dtype == np.int64, kind
        assert offsets[0] == 0, kind
        assert offsets[-1] == len(ids), kind
        rows = tokenizer.encode_batch(texts)
        for row, text in zip(rows, texts, strict=True):
            assert row.tolist() == tokenizer.encode(text), (kind, text)
            if "[CLS]" not in text:  # SentencePiece may show unknown text that spells a special token
                assert tokenizer.encode(text) == tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)), (kind, text)
            if kind not in ("hfpretrained", "space"):  # whose words in a text may be special tokens
                assert tokenizer.cls_id not in row, (kind, text)  # neither added nor read from the text
        assert len(tokenizer.vocab) == tokenizer.vocab_size == len(tokenizer.inv_vocab), kind
        assert all(tokenizer.inv_vocab[index] == token for token, index in tokenizer.vocab.items()), kind
        assert set(tokenizer.special.ids()).isdisjoint(tokenizer.ordinary_ids().tolist()), kind
        assert isinstance(tokenizer.decode(tokenizer.encode("the cat")), str), kind
        empty_ids, empty_offsets = tokenizer.encode_packed([])
        assert (len(empty_ids), empty_offsets.tolist()) == (0, [0]), kind
        assert tokenizer.encode_batch([]) == [], kind
        with pytest.raises(IndexError):
            tokenizer.convert_ids_to_tokens([tokenizer.vocab_size])


def test_every_kind_travels_to_worker_processes(tokenizers: dict[str, Tokenizer]) -> None:
    for kind, tokenizer in tokenizers.items():
        ids = tokenizer.encode(TEXT)
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode(TEXT) == ids, kind
        assert copy.fingerprint == tokenizer.fingerprint, kind


def test_texts_are_encoded_alike_across_chunks(tokenizers: dict[str, Tokenizer]) -> None:
    texts = [TEXT[: index % len(TEXT)] for index in range(3 * CHUNK_CHARS // len(TEXT))]
    for kind, tokenizer in tokenizers.items():
        rows = tokenizer.encode_batch(texts)
        assert len(rows) == len(texts), kind
        for index in (0, 1, 57, len(texts) // 2, len(texts) - 1):
            assert rows[index].tolist() == tokenizer.encode(texts[index]), (kind, index)


def wordpiece(tmp_path: Path | None = None, *, lower: bool) -> WordPieceTokenizer:
    """A `bert` tokenizer without files."""
    from tencentpretrain.tokenizers.special_tokens import find_special_tokens

    vocab = {token: index for index, token in enumerate(VOCABULARY)}
    special = find_special_tokens(vocab, source="test", map_path=None)
    return WordPieceTokenizer(VOCABULARY, special, do_lower_case=lower, source="test")


LOWER, CASED = wordpiece(lower=True), wordpiece(lower=False)


@settings(max_examples=400, deadline=None)
@given(st.lists(any_text, max_size=6))
def test_bulk_lookup_equals_the_plain_path(texts: list[str]) -> None:
    for tokenizer in (LOWER, CASED):
        assert [row.tolist() for row in tokenizer.encode_batch(texts)] == [tokenizer.encode_plain(t) for t in texts]


def test_bulk_lookup_knows_every_character() -> None:
    points = [*range(0xD800), *range(0xF000, 0x11800), *range(0x1D000, 0x20100), 0x2A6DF, 0x2B81F, 0x2FA1D, 0xE0001]
    texts = [f"a{chr(point)}s" for point in points]
    for tokenizer in (wordpiece(lower=True), wordpiece(lower=False)):
        ids, offsets = tokenizer.encode_packed(texts)
        plain = tokenizer._encode_words(texts)
        assert offsets.tolist() == np.cumsum([0, *map(len, plain)]).tolist()
        assert ids.tolist() == [token_id for row in plain for token_id in row]


def test_bert_by_hand() -> None:
    assert LOWER.tokenize("HÉllo,\u200b中x國") == ["he", "##llo", ",", "中", "x", "[UNK]"]
    assert CASED.tokenize("HÉllo he") == ["[UNK]", "he"]
    assert LOWER.tokenize("a" * 200) == ["a", *["##a"] * 199]
    assert LOWER.tokenize("a" * 201 + " a") == ["[UNK]", "a"]
    assert LOWER.tokenize("ΣΣ") == ["σ", "##ς"]  # a capital sigma at the end of a word
    assert LOWER.tokenize("[MASK]")[0] == "[UNK]"
    assert LOWER.decode(LOWER.encode("hello 中国人 ab")) == "hello 中国人 ab"


def test_a_cached_word_keeps_its_ids_when_the_cache_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = wordpiece(lower=True)
    texts = [f"abc{letter}a{other}" for letter in "abces" for other in "abces"]
    before = [row.tolist() for row in tokenizer.encode_batch(texts)]
    monkeypatch.setattr("tencentpretrain.tokenizers.lookup._MAX_CHARS", 1)
    for _ in range(3):
        assert [row.tolist() for row in tokenizer.encode_batch(texts)] == before


@pytest.fixture(scope="session")
def bpe(folder: Path) -> BpeTokenizer:
    """A byte-level BPE."""
    tokenizer = build_tokenizer(config("bpe", folder))
    assert isinstance(tokenizer, BpeTokenizer)
    return tokenizer


assigned = st.characters(exclude_categories=["Cs", "Cn", "Co"])
quoted = st.text(st.sampled_from(list("'strevmld SLR12!\n\t  é中\u00a0\u3000\x1c\x85²")))


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(st.one_of(quoted, st.text(assigned)), max_size=6))
def test_bpe_equals_the_rust_pipeline(texts: list[str], bpe: BpeTokenizer) -> None:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import pre_tokenizers

    rust = RustTokenizer(bpe._rust.model)
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    expected = [encoding.ids for encoding in rust.encode_batch(texts, add_special_tokens=False)]
    assert [row.tolist() for row in bpe.encode_batch(texts)] == expected
    assert [bpe.decode(ids) for ids in expected] == texts


def test_bpe_splits_as_the_published_pattern(bpe: BpeTokenizer) -> None:
    parts, offsets = bpe.split(["I'm  a 'tis we'll\n\n x's's", "'s", "don", "'t"])
    first = ["I", "'m", " ", " a", " '", "tis", " we", "'ll", "\n\n", " x", "'s", "'s"]
    assert parts == [*first, "'s", "don", "'t"]
    assert offsets.tolist() == [0, len(first), len(first) + 1, len(first) + 2, len(first) + 3]


def test_bpe_without_some_bytes_has_unknown_tokens(tmp_path: Path) -> None:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "ab", "\u0120", "\u0120ab"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n\u0120 ab\n", encoding="utf-8")
    files = {"vocab_path": str(tmp_path / "vocab.txt"), "merges_path": str(tmp_path / "merges.txt")}
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer="bpe", **files))
    texts = ["ab ab", "中ab", "", "cab  b", "ab"]
    assert [tokenizer.tokenize(text) for text in texts] == [
        ["ab", "\u0120ab"],
        ["<unk>", "<unk>", "<unk>", "ab"],
        [],
        ["<unk>", "ab", "\u0120", "\u0120", "b"],
        ["ab"],
    ]
    assert [row.tolist() for row in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


def test_char_and_space(folder: Path) -> None:
    char = build_tokenizer(config("char", folder))
    space = build_tokenizer(config("space", folder))
    assert char.tokenize(" a b中A ") == ["a", "[UNK]", "b", "中", "[UNK]"]
    assert space.tokenize(" he  ab\t国 ") == ["he", "[UNK]", "[UNK]"]
    assert space.tokenize("") == ["[UNK]"]


def test_sentencepiece_ids(tokenizers: dict[str, Tokenizer]) -> None:
    plain, xlmr = tokenizers["bert on SentencePiece"], tokenizers["xlmroberta"]
    assert list(plain.tokens[:5]) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert list(xlmr.tokens[:4]) == ["<s>", "<pad>", "</s>", "<unk>"]
    assert xlmr.tokens[-1] == "<mask>"
    assert (xlmr.pad_id, xlmr.unk_id, xlmr.mask_id) == (1, 3, xlmr.vocab_size - 1)
    assert plain.tokenize("the cat")[0].startswith("\u2581")
    assert plain.encode("😀")[-1] == plain.unk_id
    assert plain.decode(plain.encode("the cats")) == "the cats"


def test_word_starts() -> None:
    tokens = ["[CLS]", "he", "##llo", "中", "##國", "a", "[SEP]"]
    starts = LOWER.word_starts(np.array(LOWER.convert_tokens_to_ids(tokens)))
    assert starts.tolist() == [True, True, False, True, False, True, True]
    assert LOWER.word_starts(np.array([], np.int64)).tolist() == []


def test_word_starts_of_bytes_and_pieces(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("bpe", "bert on SentencePiece", "hfpretrained"):
        tokenizer = tokenizers[kind]
        ids = np.array([tokenizer.cls_id, *tokenizer.encode("the hats sat"), tokenizer.sep_id])
        starts = tokenizer.word_starts(ids)
        words = tokenizer.decode(ids[1:-1].tolist()).split()
        assert starts.sum() == len(words) + 2, (kind, tokenizer.convert_ids_to_tokens(ids), starts)
        assert starts[0], kind
        assert starts[-1], kind


def test_ordinary_ids_leave_out_special_reserved_and_sentinels() -> None:
    drawn = {VOCABULARY[index] for index in LOWER.ordinary_ids()}
    assert drawn == set(PIECES)


def test_sentinels_are_counted() -> None:
    assert LOWER.sentinel_id == VOCABULARY.index("<extra_id_0>")
    assert LOWER.num_sentinels == 3


def test_fingerprint_tells_apart_what_changes_ids(folder: Path) -> None:
    names = {"pad_token": "a", "unk_token": "b", "cls_token": "c", "sep_token": "d"}
    (folder / "other_map.json").write_text(json.dumps(names))
    (folder / "longer.txt").write_text("\n".join([*VOCABULARY, "more"]) + "\n", encoding="utf-8")
    configs = [
        config("bert", folder),
        config("bert", folder, do_lower_case="false"),
        config("char", folder),
        config("space", folder),
        config("bert", folder, special_tokens_map=str(folder / "other_map.json")),
        config("bert", folder, vocab_path=str(folder / "longer.txt")),
        config("bpe", folder),
        config("xlmroberta", folder),
    ]
    prints = [build_tokenizer(one).fingerprint for one in configs]
    assert len(set(prints)) == len(configs)
    assert prints == [build_tokenizer(one).fingerprint for one in configs]


def test_both_sides_of_a_translation_model_have_their_own_files(folder: Path) -> None:
    source = build_tokenizer(config("bert", folder, spm_model_path=str(folder / "spm.model"), vocab_path=None))
    target = build_tokenizer(config("bpe", folder))
    assert source.vocab_size != target.vocab_size
    assert source.encode("the cat") != target.encode("the cat")


def test_virtual_refuses_text() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer="virtual"))
    assert tokenizer.vocab_size == 0
    assert tokenizer.pad_id == 0
    with pytest.raises(ConfigError, match="no vocabulary"):
        tokenizer.encode_batch(["text"])


def test_configuration_is_validated_without_heavy_imports() -> None:
    code = (
        "import sys; from tencentpretrain.tokenizers import TokenizerConfig; "
        "problems = list(TokenizerConfig(tokenizer='bpe').problems()); "
        "assert len(problems) == 2, problems; "
        "assert not {'torch', 'numpy', 'tokenizers', 'sentencepiece'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "brt"}, "did you mean 'bert'"),
        ({"tokenizer": "bert"}, "needs a vocabulary"),
        ({"tokenizer": "xlmroberta", "vocab_path": "v.txt"}, "needs a SentencePiece model"),
        ({"tokenizer": "bpe", "vocab_path": "v.txt"}, "needs the merges"),
        ({"tokenizer": "char", "vocab_path": "v.txt", "merges_path": "m.txt"}, "no effect"),
        ({"tokenizer": "hfpretrained"}, "Hugging Face"),
    ],
)
def test_contradictions_are_said(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(TokenizerConfig(**changes))
