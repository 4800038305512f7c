"""preprocess.py as a command: its account, its answers to bad input, and continuing after a worker was killed."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from data_samples import SlowTokenizer, corpus_text, digest, tokenizer_of

from tencentpretrain.config.data import CorpusConfig
from tencentpretrain.data.build import build_store
from tencentpretrain.data.store import Store
from tencentpretrain.entry.preprocess import main
from tencentpretrain.errors import ResourceError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    tokenizer_of(tmp_path)
    return tmp_path / "vocab.txt"


def run(vocabulary: Path, corpus: Path, output: Path, *flags: str) -> int:
    paths = ["--corpus_path", str(corpus), "--dataset_path", str(output), "--vocab_path", str(vocabulary)]
    return main([*paths, "--tokenizer", "space", "--data_processor", "bert", *flags])


def test_same_bytes_for_any_number_of_processes(tmp_path: Path, vocabulary: Path, capsys: Any) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(corpus_text("sentences", 300), encoding="utf-8")
    digests = set()
    for number in (1, 2, 3, 8):
        output = tmp_path / f"out{number}"
        assert run(vocabulary, corpus, output, "--processes_num", str(number), "--shard_bytes", "3000") == 0
        digests.add(digest(output))
        assert f"Starting {number} workers for building datasets ... " in capsys.readouterr().out
    assert len(digests) == 1
    assert run(vocabulary, corpus, tmp_path / "out1", "--shard_bytes", "3000", "--seq_length", "64") == 0
    assert "is complete already" in capsys.readouterr().out
    assert Store.open(tmp_path / "out1").settings == {"data_processor": "bert", "seq_length": 64}


def test_bad_input_gives_a_sentence_and_an_exit_code(tmp_path: Path, vocabulary: Path, capsys: Any) -> None:
    assert run(vocabulary, tmp_path / "absent.txt", tmp_path / "out") == 3
    assert "absent.txt" in capsys.readouterr().err
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert run(vocabulary, empty, tmp_path / "out") == 3
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("w1\n\nw2\n")
    assert run(vocabulary, corpus, tmp_path / "out", "--data_procesor", "bert") == 2
    assert "data_processor" in capsys.readouterr().err
    assert run(vocabulary, corpus, tmp_path / "out", "--json_format_corpus") == 2
    (tmp_path / "taken").write_text("mine")
    assert run(vocabulary, corpus, tmp_path / "taken") == 5
    assert (tmp_path / "taken").read_text() == "mine"
    assert run(vocabulary, corpus, tmp_path / "taken", "--overwrite") == 0
    assert len(Store.open(tmp_path / "taken")) == 2


class _Killer:
    """A reporter that kills a worker after some progress."""

    def __init__(self, after: int) -> None:
        self.left = after

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self.done_bytes = done_bytes

    def advance(self, num_bytes: int, lines: int, tokens: int) -> None:
        self.left -= 1
        if self.left == 0:
            import multiprocessing

            victim = multiprocessing.active_children()[0]
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)


def test_a_killed_worker_is_reported_and_only_its_shards_are_redone(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(corpus_text("sentences", 200), encoding="utf-8")
    tokenizer = tokenizer_of(tmp_path)
    config = CorpusConfig(corpus_path=str(corpus), shard_bytes=800, processes_num=3)
    build = functools.partial(build_store, config, processor="bert", record_format="sentences")
    expected = digest(build(tmp_path / "whole", tokenizer=tokenizer).store.path)
    output = tmp_path / "store"
    partial = output.with_name("store.partial")
    finished: dict[str, int] = {}
    for after in (2, 3, 4):
        with pytest.raises(ResourceError, match=r"worker \d \(process \d+\) was killed by SIGKILL") as caught:
            build(output, tokenizer=SlowTokenizer(tokenizer), reporter=_Killer(after))
        named = re.search(
            r"at shard (\d+) \(bytes [\d,]+ to [\d,]+ of the corpus\), after line [\d,]+", str(caught.value)
        )
        assert named
        assert not (partial / f"shard-{int(named[1]):05d}.json").exists()
        published = len(list(partial.glob("shard-*.json")))
        assert all(
            (partial / f"shard-{index:05d}.json").exists() for index in range(published + 1) if index != int(named[1])
        )
        assert caught.value.exit_code == 5
        assert not output.exists()
        now = {path.name: path.stat().st_mtime_ns for path in partial.glob("shard-*.json")}
        assert all(now[name] == stamp for name, stamp in finished.items())
        finished = now
    assert finished
    store = build(output, tokenizer=tokenizer).store
    assert digest(store.path) == expected
    assert not partial.exists()


def test_the_script_can_be_killed_and_continued(tmp_path: Path, vocabulary: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(corpus_text("sentences", 4000), encoding="utf-8")
    output = tmp_path / "store"
    command = [
        sys.executable,
        str(ROOT / "preprocess.py"),
        "--corpus_path",
        str(corpus),
        "--vocab_path",
        str(vocabulary),
    ]
    command += ["--tokenizer", "space", "--dataset_path", str(output), "--shard_bytes", "5000", "--processes_num", "2"]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while (
        not list(tmp_path.glob("store.partial/shard-*.json")) and first.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    first.kill()
    first.wait()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert "records" in done.stdout
    assert len(Store.open(output, verify=True)) == 4000
    help_text = subprocess.run([*command[:2], "--help"], capture_output=True, text=True, check=True, timeout=20).stdout
    assert "--corpus_path" in help_text
