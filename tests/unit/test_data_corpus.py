"""The corpus reader: no line is lost, none is read twice, each fault has its place."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path

import pytest
import zstandard
from data_samples import corpus_text, digest, make_store, sentence
from hypothesis import given, settings
from hypothesis import strategies as st

from tencentpretrain.data import corpus as corpus_module
from tencentpretrain.data.corpus import Corpus, cut_ranges, cut_stream, decode_chunk, open_corpus, read_chunks
from tencentpretrain.data.records import parse_lines
from tencentpretrain.errors import DataFormatError

PIECES = st.sampled_from(
    [b"a", b"bc", b"\n", b"\r\n", b"\r", b"\n\n", "中".encode(), b"\xff", b"\0", b"\xe2\x80\xa8", b" "]
)


def expected_lines(content: bytes) -> list[bytes]:
    lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(PIECES, min_size=1, max_size=60), shard_bytes=st.integers(1, 40), block=st.integers(1, 16))
def test_ranges_together_hold_every_line_once(pieces: list[bytes], shard_bytes: int, block: int) -> None:
    content = b"".join(pieces)
    folder = Path(pytest.importorskip("tempfile").mkdtemp())
    path = folder / "corpus"
    path.write_bytes(content)
    original, corpus_module.CHUNK_BYTES = corpus_module.CHUNK_BYTES, block
    try:
        corpus = Corpus(path=path, size=len(content), mtime_ns=0, compression=None)
        for documents in (False, True):
            found = []
            with path.open("rb") as file:
                for begin, end in cut_ranges(corpus, shard_bytes, documents=documents):
                    for chunk in read_chunks(file, begin, end):
                        for index, line in enumerate(chunk.lines):
                            found.append((chunk.offset_of(index), line, chunk.faults.get(index)))
            expected = expected_lines(content)
            assert len(found) == len(expected)
            for (offset, line, fault), raw in zip(found, expected, strict=True):
                assert content[offset : offset + len(raw)] == raw
                usable = b"\0" not in raw and b"\xff" not in raw
                assert (fault is None) == usable
                assert line == (raw.decode().strip() if usable else None)
    finally:
        corpus_module.CHUNK_BYTES = original


@settings(max_examples=100, deadline=None)
@given(
    documents=st.lists(st.lists(st.sampled_from(["a", "bb", "c c"]), min_size=0, max_size=5), min_size=1, max_size=12),
    shard_bytes=st.integers(1, 60),
    end=st.sampled_from(["", "\n", "\n\n", "\n\n\n"]),
)
def test_no_document_is_cut(documents: list[list[str]], shard_bytes: int, end: str) -> None:
    content = ("\n\n".join("\n".join(document) for document in documents) + end).encode()
    path = Path(pytest.importorskip("tempfile").mkdtemp()) / "corpus"
    path.write_bytes(content)
    corpus = Corpus(path=path, size=len(content), mtime_ns=0, compression=None)
    found = []
    with path.open("rb") as file:
        for begin, stop in cut_ranges(corpus, shard_bytes, documents=True):
            text = [line for chunk in read_chunks(file, begin, stop) for line in chunk.lines]
            found += [part.split("\n") for part in "\n".join(line or "" for line in text).split("\n\n") if part.strip()]
    whole = [part.split("\n") for part in content.decode().split("\n\n") if part.strip()]
    assert [[line for line in document if line] for document in found] == [
        [line for line in document if line] for document in whole
    ]


def test_byte_order_marks_and_line_separators() -> None:
    chunk = decode_chunk(b"\xef\xbb\xbfone\r\ntwo\xe2\x80\xa8still two\rthree\n\xef\xbb\xbffour", 0)
    assert chunk.lines == ["one", "two\u2028still two", "three", "four"]
    assert not chunk.faults


def test_reasons_for_tsv_and_json() -> None:
    chunk = decode_chunk(b"1\ttext\nx\ttext\n-1\ttext\n1\n1\ta\tb\tc\n", 0)
    parsed = parse_lines("labelled", chunk)
    assert parsed.labels == [1]
    assert [reason.partition(":")[0] for _, reason in sorted(chunk.faults.items())] == [
        "label is not a whole number",
        "label is negative or too large",
        "wrong number of columns",
        "wrong number of columns",
    ]
    lines = [
        '{"text": "a"}',
        '{"text": 1}',
        "[1]",
        "{",
        '{"text": "a", "text": "b"}',
        '{"x": ""}',
        '{"text": "\\ud800"}',
    ]
    chunk = decode_chunk("\n".join(lines).encode(), 0)
    assert parse_lines("json_lines", chunk).texts == ["a"]
    assert sorted(chunk.faults) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (bytes(range(256)) * 40, "binary"),
        ("text\n".encode("utf-16"), "UTF-16"),
        ("text\n".encode("utf-16-le") * 50, "binary"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "git-lfs"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>\n", "HTML"),
    ],
)
def test_unusable_corpora_are_named(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    with pytest.raises(DataFormatError, match=word) as caught:
        open_corpus(path)
    assert str(path) in str(caught.value)
    with pytest.raises(DataFormatError, match="cannot be read"):
        open_corpus(tmp_path / "absent")


def test_a_few_bad_lines_are_no_reason_to_refuse(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"good line\n" * 20 + b"\xff\n" + b"nul \0\n")
    assert open_corpus(path).size > 0


@pytest.mark.parametrize("kind", ["gz", "zst", "zst frames"])
def test_compressed_content_is_cut_like_plain(tmp_path: Path, kind: str) -> None:
    content = corpus_text("sentences", 200).encode()
    path = tmp_path / "corpus"
    pack = {
        "gz": gzip.compress,
        "zst": zstandard.ZstdCompressor().compress,
        "zst frames": lambda data: b"".join(
            zstandard.ZstdCompressor().compress(part) for part in (data[:999], data[999:])
        ),
    }[kind]
    path.write_bytes(pack(content))
    plain = tmp_path / "plain"
    plain.write_bytes(content)
    for documents in (True, False):
        ranges = [b"".join(pieces) for pieces in cut_stream(open_corpus(path), 700, documents=documents)]
        expected = [content[begin:end] for begin, end in cut_ranges(open_corpus(plain), 700, documents=documents)]
        assert ranges == expected


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_truncated_archives_are_refused(tmp_path: Path, kind: str) -> None:
    rng = random.Random(0)
    content = "\n".join(sentence(rng) for _ in range(3000)).encode()
    packed = gzip.compress(content) if kind == "gz" else zstandard.ZstdCompressor().compress(content)
    for share in (0.3, 0.7, 0.999):
        with pytest.raises(DataFormatError, match="damaged or cut off"):
            make_store(tmp_path / f"{share}", "lm", packed[: int(len(packed) * share)])


def test_same_store_from_plain_and_compressed(tmp_path: Path) -> None:
    content = corpus_text("sentences", 120).encode()
    plain = make_store(tmp_path / "a", "bert", content)
    for name, packed in (("gz", gzip.compress(content)), ("zst", zstandard.ZstdCompressor().compress(content))):
        packed_store = make_store(tmp_path / name, "bert", packed, processes_num=2)
        assert packed_store.fingerprint == plain.fingerprint
        assert not list((tmp_path / name).glob("*.partial"))


def test_a_line_longer_than_any_block(tmp_path: Path) -> None:
    words = ["w1", "w2", "w3"] * 500_000
    store = make_store(tmp_path, "lm", " ".join(words) + "\nw4\n", shard_bytes=1000)
    assert len(store) == 2
    assert store.num_tokens == len(words) + 1
    assert store.segment(0)[:4].tolist() == [6, 7, 8, 6]


def faulty_corpus(rng: random.Random, lines: int, faults: int) -> tuple[bytes, set[int]]:
    """Returns a corpus of TSV pairs with malformed lines, and their numbers."""
    bad = set(rng.sample(range(1, lines + 1), faults))
    spoilt = [b"one column", b"a\tb\tc", b"bad \xff\tx", b"nul \0\tx", b"\xed\xa0\x80\tx", b"\tempty", b"\xc3\tb"]
    ends = [b"\n", b"\r\n"]
    out = io.BytesIO()
    for number in range(1, lines + 1):
        if number in bad:
            line = rng.choice(spoilt)
        else:
            line = b"" if rng.random() < 0.02 else f"{sentence(rng)}\t{sentence(rng)}".encode()
        out.write(line + rng.choice(ends))
    return out.getvalue().rstrip(b"\r\n"), bad


def test_account_balances_with_a_thousand_faults(tmp_path: Path) -> None:
    content, bad = faulty_corpus(random.Random(5), 8000, 1000)
    lines = len(expected_lines(content))
    digests = set()
    for processes in (1, 2, 3, 8):
        store = make_store(tmp_path, "mt", content, shard_bytes=40_000, processes_num=processes, overwrite=False)
        account = store.header.account
        assert account.lines == lines == account.kept + account.blank + account.total_rejected
        assert account.kept == len(store)
        rejected = [json.loads(line) for line in (store.path / "rejected.jsonl").read_text().splitlines()]
        assert {entry["line"] for entry in rejected} == {number for number in bad if number <= lines}
        for entry in rejected[::100]:
            begin = entry["byte"]
            assert begin == 0 or content[begin - 1 : begin] in (b"\n", b"\r")
        digests.add(digest(store.path))
        store.path.rename(tmp_path / f"done-{processes}")
    assert len(digests) == 1
