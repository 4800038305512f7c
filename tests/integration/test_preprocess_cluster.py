"""preprocess.py on a Ray cluster of two workers: the bytes of the local run, whatever happens to a worker."""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import data_samples
import pytest
from data_samples import (
    DyingTokenizer,
    FailingTokenizer,
    SlowTokenizer,
    WaitingTokenizer,
    corpus_text,
    digest,
    tokenizer_of,
)

from tencentpretrain.config.data import CorpusConfig
from tencentpretrain.data import premises as premises_module
from tencentpretrain.data.build import build_store
from tencentpretrain.data.corpus import open_corpus
from tencentpretrain.data.premises import Premises, check_answer
from tencentpretrain.data.shards import ShardJob
from tencentpretrain.entry.preprocess import main
from tencentpretrain.errors import ConfigError, DataFormatError, ResourceError, TencentPretrainError


def need_ray() -> None:
    """Skips the test where Ray is absent, except in CI."""
    if find_spec("ray") is None:
        absent = "needs Ray: pip install 'tencentpretrain[cluster]'"
        pytest.fail(absent) if os.environ.get("CI") else pytest.skip(absent)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without work and two machines of one CPU each, all of them processes of this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    need_ray()
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    with pytest.MonkeyPatch.context() as patch:  # the workers import the tokenizers of the tests
        patch.setenv("PYTHONPATH", str(Path(data_samples.__file__).parent))
        for _ in range(2):
            started.add_node(num_cpus=1)
        yield started
    started.shutdown()


def builder_of(folder: Path, cluster: Any, size: int = 200) -> Any:
    """Returns `build(output, ...)` over a corpus of many small shards, and its tokenizer."""
    corpus = folder / "corpus.txt"
    corpus.write_text(corpus_text("sentences", size), encoding="utf-8")
    config = CorpusConfig(
        corpus_path=str(corpus), shard_bytes=2000, processes_num=2, executor="ray", ray_address=cluster.address
    )
    return functools.partial(build_store, config, processor="bert", record_format="sentences")


def local_digest(folder: Path, build: Any) -> str:
    config = build.args[0].model_copy(update={"executor": "local"})
    return digest(build.func(config, folder / "local", **build.keywords, tokenizer=tokenizer_of(folder)).store.path)


class Interrupter:
    """A reporter that calls a function after some progress, once."""

    def __init__(self, after: int, action: Any) -> None:
        self.left, self.action = after, action
        self.bytes = 0

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self.bytes += done_bytes

    def advance(self, num_bytes: int, lines: int, tokens: int) -> None:
        self.bytes += num_bytes
        self.left -= 1
        if self.left == 0:
            self.action()


def test_the_command_gives_the_bytes_of_the_local_run(
    tmp_path: Path, cluster: Any, capfd: Any, monkeypatch: Any
) -> None:
    tokenizer_of(tmp_path)
    content = corpus_text("sentences", 300).encode() + b"w1\n\nw2\r\xff\0\r\n" * 300
    (tmp_path / "plain.txt").write_bytes(content)
    (tmp_path / "packed.txt").write_bytes(gzip.compress(content, mtime=0))
    monkeypatch.chdir(tmp_path)  # relative paths must mean the same to workers
    for name in ("plain", "packed"):
        flags = ["--corpus_path", f"{name}.txt", "--vocab_path", "vocab.txt", "--tokenizer", "space"]
        flags += ["--shard_bytes", "3000", "--processes_num", "2", "--max_rejected", "1", "--data_processor", "bert"]
        assert main([*flags, "--dataset_path", f"{name}.local"]) == 0
        local = capfd.readouterr().out
        assert (
            main([*flags, "--dataset_path", f"{name}.ray", "--executor", "ray", "--ray_address", cluster.address]) == 0
        )
        on_ray = capfd.readouterr().out
        assert digest(tmp_path / f"{name}.local") == digest(tmp_path / f"{name}.ray")
        account = re.compile(r"[\d,]+ lines read = .*")
        assert account.findall(local) == account.findall(on_ray) != []
    assert not list(tmp_path.glob("*.partial"))


def test_a_lost_machine_is_made_up_for(tmp_path: Path, cluster: Any, capfd: Any) -> None:
    build = builder_of(tmp_path, cluster)
    expected = local_digest(tmp_path, build)
    victim = cluster.add_node(num_cpus=1)
    mark = tmp_path / "victim-is-at-work"
    try:
        config = build.args[0].model_copy(update={"processes_num": 3})
        tokenizer = WaitingTokenizer(tokenizer_of(tmp_path), victim.node_id, mark)
        reporter = Interrupter(1, lambda: cluster.remove_node(victim, allow_graceful=False))
        result = build.func(config, tmp_path / "ray", **build.keywords, tokenizer=tokenizer, reporter=reporter)
    finally:
        if victim in cluster.worker_nodes:
            cluster.remove_node(victim)
    assert digest(result.store.path) == expected
    assert re.search(
        r"worker \d on \S+ was lost at shard \d+ \(bytes .*; another worker makes it again", capfd.readouterr().err
    )
    assert reporter.bytes == (tmp_path / "corpus.txt").stat().st_size


def test_a_killed_worker_is_replaced(tmp_path: Path, cluster: Any, capfd: Any) -> None:
    build = builder_of(tmp_path, cluster)
    path = tmp_path / "corpus.txt"
    path.write_text(path.read_text(encoding="utf-8") + "\nw1 deadly\n", encoding="utf-8")
    expected = local_digest(tmp_path, build)
    result = build(
        tmp_path / "ray", tokenizer=DyingTokenizer(tokenizer_of(tmp_path), "deadly", tmp_path / "somebody-died")
    )
    assert digest(result.store.path) == expected
    account = result.store.header.account
    assert account.lines == account.kept + account.blank
    assert len(re.findall(r"was lost at shard \d+ \(bytes", capfd.readouterr().err)) == 1


def test_an_interrupted_build_redoes_only_unfinished_shards(tmp_path: Path, cluster: Any) -> None:
    build = builder_of(tmp_path, cluster)
    expected = local_digest(tmp_path, build)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "ray", tokenizer=SlowTokenizer(tokenizer_of(tmp_path)), reporter=Interrupter(6, stop))
    partial = tmp_path / "ray.partial"
    done = {path.name: json.loads(path.read_bytes()) for path in partial.glob("shard-*.json")}
    assert done
    reporter = Interrupter(-1, stop)
    reporter.advance = lambda num_bytes, *_: setattr(reporter, "bytes", reporter.bytes + num_bytes)  # type: ignore[method-assign]
    redone: list[int] = []
    reporter.start = lambda total, before: redone.append(total - before)  # type: ignore[method-assign]
    result = build(tmp_path / "ray", tokenizer=tokenizer_of(tmp_path), reporter=reporter)
    assert redone == [reporter.bytes]
    assert reporter.bytes == (tmp_path / "corpus.txt").stat().st_size - sum(
        ledger["end"] - ledger["begin"] for ledger in done.values()
    )
    assert digest(result.store.path) == expected


def test_errors_name_shard_and_record(tmp_path: Path, cluster: Any) -> None:
    build = builder_of(tmp_path, cluster, size=40)
    path = tmp_path / "corpus.txt"
    before = path.read_bytes()
    path.write_bytes(before + b"\nw1 w2\nw59 w59 w3\n")
    place = rf"shard \d+ \(bytes .* failed at line \d+ of it \(byte {len(before) + 7:,} of the corpus\): KeyError"
    for executor in ("ray", "local"):
        config = build.args[0].model_copy(update={"executor": executor})
        with pytest.raises(RuntimeError, match=place):
            build.func(config, tmp_path / "out", **build.keywords, tokenizer=FailingTokenizer(tokenizer_of(tmp_path)))
    path.write_bytes(before + b"\nw1 \xff\n")
    config = build.args[0].model_copy(update={"on_error": "raise"})
    with pytest.raises(DataFormatError, match=f"malformed line at byte {len(before) + 1}: not UTF-8"):
        build.func(config, tmp_path / "out", **build.keywords, tokenizer=tokenizer_of(tmp_path))
    assert not (tmp_path / "out").exists()


def test_no_cluster_is_a_sentence(tmp_path: Path, capfd: Any) -> None:
    need_ray()
    tokenizer_of(tmp_path)
    (tmp_path / "corpus.txt").write_text("w1\n\nw2\n")
    flags = ["--corpus_path", str(tmp_path / "corpus.txt"), "--vocab_path", str(tmp_path / "vocab.txt")]
    flags += ["--dataset_path", str(tmp_path / "out"), "--tokenizer", "space", "--executor", "ray"]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert main([*flags, "--ray_address", address]) == 5
    assert f"no Ray cluster answers at {address}" in capfd.readouterr().err
    assert main([*flags, "--ray_address", "ray://head:10001"]) == 2
    assert "host:port" in capfd.readouterr().err
    assert main([*flags[:-1], "local", "--ray_address", address]) == 2
    assert "no effect without --executor ray" in capfd.readouterr().err


@pytest.fixture
def job(tmp_path: Path) -> ShardJob:
    (tmp_path / "corpus.txt").write_text(corpus_text("sentences", 40), encoding="utf-8")
    (tmp_path / "parts").mkdir()
    return ShardJob(
        folder=tmp_path / "parts",
        corpus_path=str(tmp_path / "corpus.txt"),
        record_format="sentences",
        token_type="uint16",
        stop_at_fault=False,
        tokenizer=tokenizer_of(tmp_path),
        tgt_tokenizer=None,
    )


def test_machines_that_differ_are_found(tmp_path: Path, job: ShardJob, monkeypatch: Any) -> None:
    monkeypatch.setattr(premises_module, "PATIENCE_SECONDS", 0.2)
    path = tmp_path / "corpus.txt"
    premises = Premises.here(job, open_corpus(path))
    _, answer = premises.check(job)
    check_answer(job, answer, "host")
    cases: list[tuple[type[TencentPretrainError], str, Premises, ShardJob]] = [
        (ConfigError, r"tokenizers \S+ instead of 0\.1", _with_program(premises, "tokenizers", "0.1"), job),
        (DataFormatError, "fingerprint", replace(premises, tokenizers=("0" * 64,)), job),
        (ResourceError, "does not see this folder", premises, replace(job, folder=tmp_path)),
        (DataFormatError, "cannot read the corpus", replace(premises, corpus=(tmp_path / "absent", 1, "")), job),
        (DataFormatError, "tokenizer cannot be made", premises, replace(job, tokenizer=_no_tokenizer)),
    ]
    for error, sentence, wanted, seen in cases:
        with pytest.raises(error, match=sentence) as caught:
            wanted.check(seen)
        assert socket.gethostname() in str(caught.value)
    content = path.read_bytes()
    for other, sentence in ((content.replace(b"w1", b"w2", 1), "other content"), (content[:-1], "bytes instead of")):
        path.write_bytes(other)
        with pytest.raises(DataFormatError, match=sentence):
            premises.check(job)
    with pytest.raises(ResourceError, match="does not arrive"):
        check_answer(job, "answer", "host")


def _no_tokenizer() -> Any:
    raise DataFormatError("vocab.txt: absent")


def _with_program(premises: Premises, name: str, version: str) -> Premises:
    return replace(premises, programs={**premises.programs, name: version})


def test_a_range_that_reads_differently_is_refused(tmp_path: Path, job: ShardJob) -> None:
    from tencentpretrain.data.cluster import _portable
    from tencentpretrain.data.shards import ShardBuilder, ShardTask

    path = tmp_path / "corpus.txt"
    task = _portable(ShardTask(index=0, path=path, begin=0, end=path.stat().st_size))
    assert ShardBuilder(job).build(task, lambda *_: None).lines > 40
    (job.folder / "shard-00000.json").unlink()
    path.write_bytes(path.read_bytes().replace(b"w1", b"w2", 1))
    with pytest.raises(DataFormatError, match=r"shard 0 .* reads differently on"):
        ShardBuilder(job).build(task, lambda *_: None)
    assert not (job.folder / "shard-00000.json").exists()
    assert not list(job.folder.glob("*.unfinished"))
