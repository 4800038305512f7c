"""The store: damage is found and named, wrong pairings are refused, nothing of a user's is overwritten."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import Any

import pytest
from data_samples import corpus_text, digest, make_processor, make_store, tokenizer_of

from tencentpretrain.data import shards
from tencentpretrain.data.loader import Loader
from tencentpretrain.data.store import Store
from tencentpretrain.errors import DataFormatError, ResourceError
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer


def test_records_come_back(tmp_path: Path) -> None:
    text = corpus_text("sentences", 30)
    store = make_store(tmp_path, "bert", text)
    tokenizer = tokenizer_of(tmp_path)()
    documents = [part.strip().split("\n") for part in text.strip().split("\n\n")]
    assert len(store) == len(documents)
    assert len(store.header.shards) > 2
    for record, document in enumerate(documents):
        first, last = store.record_offsets[record : record + 2].tolist()
        assert [store.segment(index).tolist() for index in range(first, last)] == [
            tokenizer.encode(line) for line in document
        ]
    everything = [token for document in documents for line in document for token in tokenizer.encode(line)]
    assert store.tokens(0, store.num_tokens).tolist() == everything


def test_every_flip_is_found(tmp_path: Path) -> None:
    store = make_store(tmp_path, "bert")
    rng = random.Random(0)
    files = [path for path in store.path.iterdir() if path.name != "rejected.jsonl" and path.stat().st_size]
    for _ in range(300):
        path = rng.choice(files)
        original = path.read_bytes()
        position = rng.randrange(len(original))
        flipped = bytearray(original)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(DataFormatError, match=path.name):
            Store.open(store.path, verify=True)
        path.write_bytes(original)
    Store.open(store.path, verify=True)


def test_a_damaged_shard_is_found_when_it_is_read(tmp_path: Path) -> None:
    store = make_store(tmp_path, "bert")
    shard = store.path / store.header.shards[1].name
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)
    opened = Store.open(store.path)
    opened.tokens(0, 3)
    with pytest.raises(DataFormatError, match=shard.name):
        opened.tokens(0, opened.num_tokens)
    shard.write_bytes(content[:-1])
    with pytest.raises(DataFormatError, match="should have"):
        Store.open(store.path)


@pytest.mark.parametrize("name", sorted(PROCESSORS.names()))
def test_a_store_serves_its_layout_and_refuses_others(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path, name)
    for other in PROCESSORS.names():
        processor = make_processor(tmp_path, other)
        if store.header.layout in processor.accepts:
            batch = next(iter(Loader(store, processor, batch_size=3, seed=1, shuffle=True, num_workers=0)))
            assert batch.size == 3
        else:
            with pytest.raises(DataFormatError, match="needs"):
                Loader(store, processor, batch_size=3, seed=1, shuffle=True)


def test_another_tokenizer_is_refused_with_both_names(tmp_path: Path) -> None:
    store = make_store(tmp_path, "mlm")
    path = tmp_path / "other.txt"
    path.write_text((tmp_path / "vocab.txt").read_text() + "more\n")
    other = build_tokenizer(TokenizerConfig(tokenizer="space", vocab_path=str(path)))
    processor = PROCESSORS.get("mlm")(make_processor(tmp_path, "mlm").data, other)
    with pytest.raises(DataFormatError) as caught:
        Loader(store, processor, batch_size=3, seed=1, shuffle=True)
    for word in ("other.txt", "vocab.txt", str(other.vocab_size), str(other.vocab_size - 1), "preprocess.py"):
        assert word in str(caught.value)


def test_what_is_at_the_output_stays(tmp_path: Path) -> None:
    store = make_store(tmp_path, "mlm")
    before = digest(store.path)
    assert make_store(tmp_path, "mlm").fingerprint == store.fingerprint
    assert digest(store.path) == before
    with pytest.raises(ResourceError, match="--overwrite"):
        make_store(tmp_path, "mlm", "w1 w2\n")
    assert digest(store.path) == before
    mine = tmp_path / "lm.store"
    mine.write_text("my notes")
    with pytest.raises(ResourceError, match="something else"):
        make_store(tmp_path, "lm")
    assert mine.read_text() == "my notes"
    partial = tmp_path / "t5.store.partial"
    partial.mkdir()
    (partial / "mine").write_text("x")
    with pytest.raises(ResourceError, match="move it"):
        make_store(tmp_path, "t5")


def test_too_many_rejected_lines_stop_with_the_first_five(tmp_path: Path) -> None:
    text = "".join(f"a\tb{number}\n" if number % 50 else "no tab\n" for number in range(1, 1001))
    with pytest.raises(DataFormatError, match="wrong number of columns") as caught:
        make_store(tmp_path, "mt", text, max_rejected=0.001, shard_bytes=10**6)
    assert str(caught.value).count("\n  line ") == 5
    assert "line 50:" in str(caught.value)
    with pytest.raises(DataFormatError, match="malformed line at byte"):
        make_store(tmp_path, "mt", text, on_error="raise")
    assert len(make_store(tmp_path, "mt", text, max_rejected=0.5)) == 980


def test_a_full_disk_leaves_nothing_half_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digest(make_store(tmp_path / "whole", "bert").path)
    original = shards._ShardWriter._write
    countdown = 0

    def full(self: Any, kind: str, content: bytes) -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, kind, content)

    monkeypatch.setattr(shards._ShardWriter, "_write", full)
    folder = tmp_path / "cramped"
    for countdown_start in (1, 4, 9, 14, 20):
        countdown = countdown_start
        with pytest.raises(ResourceError, match="disk is full") as caught:
            make_store(folder, "bert")
        assert caught.value.exit_code == 5
        assert not (folder / "bert.store").exists()
        with pytest.raises(DataFormatError, match="not finished"):
            Store.open(folder / "bert.store")
    countdown = -1
    store = make_store(folder, "bert")
    header = json.loads((store.path / "header.json").read_text())
    header["inputs"]["corpus"] = header["crc32"] = None
    whole = json.loads((tmp_path / "whole" / "bert.store" / "header.json").read_text())
    whole["inputs"]["corpus"] = whole["crc32"] = None
    assert header == whole
    assert expected


def test_a_corpus_that_grows_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = shards.ShardBuilder.build

    def build(self: Any, task: Any, progress: Any) -> Any:
        with task.path.open("ab") as file:
            file.write(b"w1 w2\n")
        return original(self, task, progress)

    monkeypatch.setattr(shards.ShardBuilder, "build", build)
    with pytest.raises(DataFormatError, match="was changed while it was read"):
        make_store(tmp_path, "mlm")
    assert not (tmp_path / "mlm.store").exists()
