"""Builds a store: cuts the corpus, has the shards made, balances the account, publishes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tencentpretrain import faults
from tencentpretrain.config.data import CorpusConfig
from tencentpretrain.data.corpus import Corpus, cut_ranges, cut_stream, open_corpus, read_chunks
from tencentpretrain.data.durable import storage_errors, to_json, write_durably
from tencentpretrain.data.publish import INPUTS, publish, write_index
from tencentpretrain.data.records import LAYOUT_OF, RecordFormat
from tencentpretrain.data.shards import UNFINISHED, Ledger, ShardJob, ShardTask, stem
from tencentpretrain.data.store import HEADER, Account, Header, Store, TokenizerFacts
from tencentpretrain.data.workers import run_tasks
from tencentpretrain.errors import DataFormatError, ResourceError
from tencentpretrain.tokenizers.base import Tokenizer


class Reporter(Protocol):
    """Shows how far a build is."""

    def start(self, total_bytes: int, done_bytes: int) -> None: ...

    def advance(self, num_bytes: int, lines: int, tokens: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A published store, and whether it was already there."""

    store: Store
    existed: bool


def build_store(
    corpus_config: CorpusConfig,
    output: str | Path,
    *,
    processor: str,
    record_format: RecordFormat,
    tokenizer: Callable[[], Tokenizer],
    tgt_tokenizer: Callable[[], Tokenizer] | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> BuildResult:
    """Tokenises a corpus into a store; continues where an interrupted build of the same inputs stopped.

    Args:
        output: where the store will be; while it is made, its parts lie in `<output>.partial`.
        processor: the data processor that the store is made for.
        tokenizer, tgt_tokenizer: make a tokenizer; called in every worker, so they must be picklable.
        settings: how samples are to be drawn, kept for `pretrain.py`.
        overwrite: replace what is at `output`.

    Raises:
        DataFormatError: the corpus is unusable, was edited meanwhile, or too many lines are malformed.
        ResourceError: a worker died, the disk is full, or `output` is taken.
    """
    output = Path(output)
    corpus = open_corpus(corpus_config.corpus_path)
    source, target = tokenizer(), tgt_tokenizer() if tgt_tokenizer else None
    facts, tgt_facts = TokenizerFacts.of(source), TokenizerFacts.of(target) if target else None
    vocab_size = max(source.vocab_size, target.vocab_size if target else 0)
    del source, target
    inputs: dict[str, Any] = {
        "corpus": corpus_config.corpus_path,
        "size": corpus.size,
        "compression": corpus.compression,
        "record_format": record_format,
        "shard_bytes": corpus_config.shard_bytes,
    }
    header = Header(
        layout=LAYOUT_OF[record_format],
        processor=processor,
        tokenizer=facts,
        tgt_tokenizer=tgt_facts,
        inputs=inputs,
        settings=dict(settings or {}),
        token_type="uint16" if vocab_size <= 1 << 16 else "uint32",
        num_records=0,
        num_segments=0,
        num_tokens=[],
        account=Account(rejected={}),
        shards=[],
        index=[],
    )
    if output.exists() and not overwrite:
        return BuildResult(store=_existing(output, header, corpus), existed=True)
    folder = output.with_name(output.name + ".partial")
    with storage_errors(folder, corpus.size):
        output.parent.mkdir(parents=True, exist_ok=True)
        _prepare(folder, header, corpus)
    job = ShardJob(
        folder=folder,
        corpus_path=str(corpus_config.corpus_path),
        record_format=record_format,
        token_type=header.token_type,
        stop_at_fault=corpus_config.on_error == "raise",
        tokenizer=tokenizer,
        tgt_tokenizer=tgt_tokenizer,
    )
    ledgers = _make_shards(job, corpus, corpus_config, reporter)
    corpus.check_unchanged()
    with storage_errors(folder, sum(16 * ledger.segments for ledger in ledgers)):
        _check_rejected(job, corpus, ledgers, corpus_config.max_rejected, final=True)
        content = _content((ledger.begin, ledger.end, ledger.source_crc32) for ledger in ledgers)
        entries = _rejected_entries(folder, corpus, ledgers)
        header = write_index(folder, header, ledgers, entries, content)
        publish(folder, output, header)
    return BuildResult(store=Store.open(output), existed=False)


def _existing(output: Path, wanted: Header, corpus: Corpus) -> Store:
    """Returns the store at `output` if it was made from the same inputs, after reading the corpus to be sure.

    Raises:
        ResourceError: something else is there.
    """
    try:
        store = Store.open(output)
    except DataFormatError as error:
        raise ResourceError(
            f"{output}: there is already something else ({error}); name another --dataset_path, or add --overwrite"
        ) from None
    found = store.header
    inputs = {**wanted.inputs, "content": found.inputs.get("content")}
    same = (found.layout, found.tokenizer.fingerprint, found.tgt_tokenizer, found.inputs) == (
        wanted.layout,
        wanted.tokenizer.fingerprint,
        wanted.tgt_tokenizer,
        inputs,
    )
    if not same or inputs["content"] != _content_of(corpus, wanted):
        raise ResourceError(
            f"{output}: there is already a data set of other inputs (corpus {found.inputs.get('corpus')}, tokenizer "
            f"{found.tokenizer}); name another --dataset_path, or add --overwrite"
        )
    if (found.processor, found.settings) != (wanted.processor, wanted.settings):
        header = replace(found, processor=wanted.processor, settings=wanted.settings)
        with storage_errors(output, 1 << 20):
            write_durably(output / HEADER, header.to_bytes())
        return Store.open(output)
    return store


def _content_of(corpus: Corpus, header: Header) -> str:
    """Returns the digest of a corpus that `_content` gives for its shards."""
    documents, shard_bytes = header.layout == "sentences", header.inputs["shard_bytes"]
    ranges: list[tuple[int, int, int]] = []
    if corpus.compression:
        begin = 0
        for pieces in cut_stream(corpus, shard_bytes, documents=documents):
            size = checksum = 0
            for piece in pieces:
                size, checksum = size + len(piece), zlib.crc32(piece, checksum)
            ranges.append((begin, begin + size, checksum))
            begin += size
        return _content(ranges)
    with corpus.path.open("rb") as file:
        for begin, end in cut_ranges(corpus, shard_bytes, documents=documents):
            checksum = 0
            for position in range(begin, end, 1 << 20):
                checksum = zlib.crc32(file.read(min(1 << 20, end - position)), checksum)
            ranges.append((begin, end, checksum))
    return _content(ranges)


def _content(ranges: Iterable[tuple[int, int, int]]) -> str:
    """Returns a digest of begin, end and checksum of the ranges of a corpus."""
    return hashlib.sha256(to_json([list(part) for part in ranges])).hexdigest()


def _prepare(folder: Path, header: Header, corpus: Corpus) -> None:
    """Makes the folder of parts, and empties one that belongs to other inputs."""
    wanted = to_json(
        {
            "inputs": header.inputs,
            "mtime_ns": corpus.mtime_ns,
            "tokenizers": [asdict(facts) for facts in (header.tokenizer, header.tgt_tokenizer) if facts],
        }
    )
    if folder.exists():
        inputs = folder / INPUTS
        finished = (folder / HEADER).is_file()  # a store that was complete when its process ended, but had no name yet
        if not inputs.is_file() and not finished and any(folder.iterdir()):
            raise ResourceError(
                f"{folder}: the name is needed for unfinished parts, but something else is there; move it"
            )
        if finished or (inputs.is_file() and inputs.read_bytes() != wanted):
            faults.reach("store.clear", folder)
            shutil.rmtree(folder)
    faults.reach("store.make", folder)
    folder.mkdir(exist_ok=True)
    for path in folder.glob(f"*{UNFINISHED}"):
        faults.reach("shard.discard-old", path)
        path.unlink(missing_ok=True)
    write_durably(folder / INPUTS, wanted)


def _make_shards(job: ShardJob, corpus: Corpus, config: CorpusConfig, reporter: Reporter | None) -> list[Ledger]:
    done: dict[int, Ledger] = {}
    documents = job.record_format == "sentences"

    def note(num_bytes: int, lines: int, tokens: int) -> None:
        if reporter:
            reporter.advance(num_bytes, lines, tokens)

    def finished(ledger: Ledger) -> None:
        done[ledger.index] = ledger
        _check_rejected(job, corpus, list(done.values()), config.max_rejected, final=False)

    if corpus.compression:
        tasks = _spooled_tasks(job, corpus, config.shard_bytes, documents, done)
        if reporter:
            reporter.start(0, 0)
    else:
        ranges = cut_ranges(corpus, config.shard_bytes, documents=documents)
        for index, (begin, end) in enumerate(ranges):
            if ledger := Ledger.load(job.folder, index, begin, end):
                done[index] = ledger
        tasks = iter(
            ShardTask(index=index, path=corpus.path, begin=begin, end=end)
            for index, (begin, end) in enumerate(ranges)
            if index not in done
        )
        if reporter:
            reporter.start(corpus.size, sum(ledger.end - ledger.begin for ledger in done.values()))
    first = next(tasks, None)
    if first is not None:
        remaining = iter(_chain(first, tasks))
        num_workers = config.processes_num
        if not corpus.compression:
            num_workers = min(num_workers, len(ranges) - len(done))
        if config.executor == "ray":
            from tencentpretrain.data.cluster import run_on_ray

            ledgers = run_on_ray(job, corpus, remaining, num_workers, note, address=config.ray_address)
        else:
            ledgers = run_tasks(job, remaining, num_workers, note)
        for ledger in ledgers:
            if corpus.compression:
                faults.reach("spool.unlink", _spool(job.folder, ledger.index))
                _spool(job.folder, ledger.index).unlink(missing_ok=True)
            finished(ledger)
    return [done[index] for index in sorted(done)]


def _chain(first: ShardTask, rest: Iterator[ShardTask]) -> Iterator[ShardTask]:
    yield first
    yield from rest


def _spool(folder: Path, index: int) -> Path:
    return folder / f"{stem(index)}.source"


def _spooled_tasks(
    job: ShardJob, corpus: Corpus, shard_bytes: int, documents: bool, done: dict[int, Ledger]
) -> Iterator[ShardTask]:
    """Unpacks a compressed corpus range by range, each into a file that its worker reads; published ones are passed."""
    begin = 0
    for index, pieces in enumerate(cut_stream(corpus, shard_bytes, documents=documents)):
        ledger = Ledger.load(job.folder, index, begin, None)
        path = _spool(job.folder, index)
        size = checksum = 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(storage_errors(path, shard_bytes))
            faults.reach("spool.open", path)
            file = stack.enter_context((path if ledger is None else Path(os.devnull)).open("wb"))
            for piece in pieces:
                faults.write("spool.write", file, piece, path)
                size += len(piece)
                checksum = zlib.crc32(piece, checksum)
        if ledger is not None and (ledger.end, ledger.source_crc32) == (begin + size, checksum):
            done[index] = ledger
        elif ledger is not None:
            raise DataFormatError(f"{corpus.path}: does not unpack to the same content as before; remove {job.folder}")
        else:
            yield ShardTask(index=index, path=path, begin=0, end=size, shift=begin, source_crc32=checksum)
        begin += size


def _check_rejected(job: ShardJob, corpus: Corpus, ledgers: list[Ledger], allowed: float, *, final: bool) -> None:
    """Stops a build with too many malformed lines, as soon as the rest of the corpus cannot change that.

    Raises:
        DataFormatError: with the first five of them.
    """
    rejected = sum(sum(ledger.rejected.values()) for ledger in ledgers)
    lines = sum(ledger.lines for ledger in ledgers)
    if not rejected:
        return
    if not final:
        if corpus.compression:
            return
        seen = sum(ledger.end - ledger.begin for ledger in ledgers)
        lines = int(lines * corpus.size / seen)
    if rejected <= allowed * lines:
        return
    entries = _rejected_entries(job.folder, corpus, ledgers)
    first = "\n".join(
        f"  line {entry['line']}: {entry['reason']}" for entry in (next(entries, None) for _ in range(5)) if entry
    )
    raise DataFormatError(
        f"{corpus.path}: {rejected:,} of {'' if final else 'about '}{lines:,} lines are malformed, more than the "
        f"allowed share of {allowed:.2%}; the first of them:\n{first}\n"
        "mend the corpus, or accept them with --max_rejected 1 (finished shards are kept)"
    )


def _rejected_entries(folder: Path, corpus: Corpus, ledgers: list[Ledger]) -> Iterator[dict[str, Any]]:
    """Yields all rejected lines in order, with their line number in the whole corpus."""
    known = {ledger.index: ledger for ledger in ledgers}
    lines_before: int | None = 0
    for index in sorted(known):
        ledger = known[index]
        if lines_before is None or (index - 1 not in known and index > 0):
            lines_before = _count_lines(corpus, ledger.begin)
        with (folder / ledger.files["rejected"].name).open(encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                yield {"file": str(corpus.path), **entry, "line": entry["line"] + lines_before}
        lines_before = lines_before + ledger.lines


def _count_lines(corpus: Corpus, end: int) -> int:
    with corpus.path.open("rb") as file:
        return sum(len(chunk.lines) for chunk in read_chunks(file, 0, end)) if end else 0
