"""One shard of a store: a range of the corpus, read, tokenised and published by one worker."""

from __future__ import annotations

import json
import os
import socket
import zlib
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tencentpretrain import faults
from tencentpretrain.data.corpus import Chunk, decode_chunk, read_chunks
from tencentpretrain.data.durable import storage_errors, to_json, write_durably
from tencentpretrain.data.records import ParsedLines, RecordFormat, parse_lines
from tencentpretrain.data.store import FileFacts
from tencentpretrain.errors import DataFormatError, TencentPretrainError
from tencentpretrain.tokenizers.base import Tokenizer

_PIECE_CHARS = 1 << 20
"""A longer line is tokenised in pieces that begin at a blank, where no tokenizer joins tokens."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What every worker of one build must know.

    Attributes:
        folder: where shards are published.
        tokenizer, tgt_tokenizer: make the tokenizers; called once in each worker.
        stop_at_fault: a malformed line ends the build.
    """

    folder: Path
    corpus_path: str
    record_format: RecordFormat
    token_type: str
    stop_at_fault: bool
    tokenizer: Callable[[], Tokenizer]
    tgt_tokenizer: Callable[[], Tokenizer] | None


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A range of bytes: `begin`:`end` of `path`, which lie `shift` bytes further on in the corpus.

    Attributes:
        source_crc32: checksum of the bytes where the work is given out; None where it is given to the same machine.
    """

    index: int
    path: Path
    begin: int
    end: int
    shift: int = 0
    source_crc32: int | None = None

    def __str__(self) -> str:
        return f"shard {self.index} (bytes {self.begin + self.shift:,} to {self.end + self.shift:,} of the corpus)"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What became of a range of the corpus; its file is written last and makes the shard count as done."""

    index: int
    begin: int
    end: int
    source_crc32: int
    lines: int
    kept: int
    blank: int
    rejected: dict[str, int]
    records: int
    segments: int
    tokens: int
    files: dict[str, FileFacts]

    @classmethod
    def load(cls, folder: Path, index: int, begin: int, end: int | None) -> Ledger | None:
        """Returns the ledger of a published shard of this range, or None where the shard must be made again."""
        try:
            values = json.loads((folder / f"{stem(index)}.json").read_bytes())
            values["files"] = {kind: FileFacts(**facts) for kind, facts in values["files"].items()}
            ledger = cls(**values)
            complete = all((folder / facts.name).stat().st_size == facts.size for facts in ledger.files.values())
        except (OSError, ValueError, TypeError, KeyError):
            return None
        fits = ledger.begin == begin and end in (None, ledger.end)
        return ledger if complete and fits else None


UNFINISHED = ".unfinished"
"""End of the names of files that a worker is writing."""

Progress = Callable[[int, int, int], None]
"""Called with the bytes, lines and tokens done since the last call."""


def stem(index: int) -> str:
    """Returns the beginning of the names of a shard's files."""
    return f"shard-{index:05d}"


class ShardBuilder:
    """Makes shards, one after the other, in constant memory."""

    def __init__(self, job: ShardJob) -> None:
        self.job = job
        self.tokenizer = job.tokenizer()
        self.tgt_tokenizer = job.tgt_tokenizer() if job.tgt_tokenizer else None
        self.token_type = np.dtype(job.token_type)

    def build(self, task: ShardTask, progress: Progress) -> Ledger:
        """Reads a range of the corpus and publishes its shard.

        Raises: as `steps`.
        """
        steps = self.steps(task)
        while True:
            try:
                progress(*next(steps))
            except StopIteration as end:
                ledger: Ledger = end.value
                return ledger

    def steps(self, task: ShardTask) -> Generator[tuple[int, int, int], None, Ledger]:
        """Reads a range of the corpus chunk by chunk, yields the progress of each, and publishes the shard.

        Raises:
            DataFormatError: the corpus ends early or has other bytes than where the work was given out, or a line is
                malformed and faults end the build.
            ResourceError: the disk is full or cannot be written.
            RuntimeError: something unexpected; the text names shard, byte and line.
        """
        with (
            storage_errors(self.job.folder / stem(task.index), (task.end - task.begin) * 2),
            _ShardWriter(self.job.folder, task.index, self.token_type) as writer,
            task.path.open("rb") as file,
        ):
            for chunk in read_chunks(file, task.begin, task.end, shift=task.shift):
                tokens = self._add_or_explain(chunk, writer, task)
                yield len(chunk.raw), len(chunk.lines), tokens
            writer.check_source(task, self.job.corpus_path)
            return writer.publish(task)

    def _add_or_explain(self, chunk: Chunk, writer: _ShardWriter, task: ShardTask) -> int:
        try:
            return self._add(chunk, writer)
        except (TencentPretrainError, OSError, MemoryError):
            raise
        except Exception as error:
            place = self._first_failing(chunk, writer.lines)
            raise RuntimeError(
                f"{self.job.corpus_path}: {task} failed at {place}: {type(error).__name__}: {error}"
            ) from error

    def _first_failing(self, chunk: Chunk, lines_before: int) -> str:
        """Looks for the line of a chunk that cannot be tokenised, one by one."""
        begins = [chunk.offset_of(index) - chunk.offset for index in range(len(chunk.lines))]
        for index, (begin, end) in enumerate(zip(begins, [*begins[1:], len(chunk.raw)], strict=True)):
            try:
                self._encode(parse_lines(self.job.record_format, decode_chunk(chunk.raw[begin:end], 0)))
            except Exception:
                return f"line {lines_before + index + 1:,} of it (byte {chunk.offset + begin:,} of the corpus)"
        return f"lines {lines_before + 1:,} to {lines_before + len(chunk.lines):,} of it"

    def _add(self, chunk: Chunk, writer: _ShardWriter) -> int:
        parsed = parse_lines(self.job.record_format, chunk)
        ids, lengths = self._encode(parsed)
        sentences = self.job.record_format == "sentences"
        if parsed.line_of and not lengths.all():
            ids, lengths = _drop_empty(parsed, chunk, ids, lengths, self.job.record_format)
        elif self.job.record_format == "lines":
            parsed.blank = int((lengths == 0).sum())
        if chunk.faults and self.job.stop_at_fault:
            index = min(chunk.faults)
            raise DataFormatError(
                f"{self.job.corpus_path}: malformed line at byte {chunk.offset_of(index)}: {chunk.faults[index]}"
            )
        if sentences:
            writer.add_sentences(ids, lengths, parsed)
        else:
            writer.add_records(ids, lengths, parsed)
        writer.account(chunk, parsed.blank)
        return len(ids)

    def _encode(self, parsed: ParsedLines) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        if self.tgt_tokenizer is None:
            ids, offsets = _encode_texts(self.tokenizer, parsed.texts)
            return ids, np.diff(offsets)
        source_ids, source_offsets = _encode_texts(self.tokenizer, parsed.texts[0::2])
        target_ids, target_offsets = _encode_texts(self.tgt_tokenizer, parsed.texts[1::2])
        return _interleave(source_ids, np.diff(source_offsets), target_ids, np.diff(target_offsets))


def _encode_texts(tokenizer: Tokenizer, texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    if max(map(len, texts), default=0) <= _PIECE_CHARS:
        return tokenizer.encode_packed(texts)
    pieces: list[str] = []
    first_piece = [0]
    for text in texts:
        pieces += _cut_at_blanks(text)
        first_piece.append(len(pieces))
    ids, offsets = tokenizer.encode_packed(pieces)
    return ids, offsets[first_piece]


def _cut_at_blanks(text: str) -> list[str]:
    """Cuts a very long text in front of single blanks."""
    pieces, begin = [], 0
    while len(text) - begin > _PIECE_CHARS:
        cut = begin + _PIECE_CHARS
        while (cut := text.find(" ", cut)) > 0 and (text[cut - 1].isspace() or text[cut + 1 : cut + 2].isspace()):
            cut += 1
        if cut < 0:
            break
        pieces.append(text[begin:cut])
        begin = cut
    return [*pieces, text[begin:]]


def _interleave(
    left: NDArray[np.uint32],
    left_lengths: NDArray[np.int64],
    right: NDArray[np.uint32],
    right_lengths: NDArray[np.int64],
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Merges two packed lists of segments to left 0, right 0, left 1, right 1, ..."""
    lengths = np.stack([left_lengths, right_lengths], axis=1).reshape(-1)
    goes_right = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    ids = np.empty(len(left) + len(right), np.uint32)
    ids[~goes_right] = left
    ids[goes_right] = right
    return ids, lengths


def _drop_empty(
    parsed: ParsedLines,
    chunk: Chunk,
    ids: NDArray[np.uint32],
    lengths: NDArray[np.int64],
    record_format: RecordFormat,
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Takes out the records that cannot be used because a side has no token."""
    record_of = np.repeat(np.arange(len(parsed.segments)), parsed.segments)
    empty = np.bincount(record_of, weights=lengths == 0, minlength=len(parsed.segments))
    if record_format == "json_lines":
        parsed.blank += int(empty.sum())
        return ids, lengths
    bad = empty == np.asarray(parsed.segments) if record_format == "instructions" else empty > 0
    for text in np.flatnonzero(bad[record_of]).tolist():
        chunk.faults[parsed.line_of[text]] = "a text without any token"
    keep_text = ~bad[record_of]
    ids = ids[np.repeat(keep_text, lengths)]
    parsed.segments = [count for count, drop in zip(parsed.segments, bad.tolist(), strict=True) if not drop]
    if parsed.labels:
        parsed.labels = [label for label, drop in zip(parsed.labels, bad.tolist(), strict=True) if not drop]
    return ids, lengths[keep_text]


class _ShardWriter:
    """Appends records to the files of a shard and publishes them.

    Until then they bear the writer's own name, since a worker that was taken for dead may still be writing.
    """

    def __init__(self, folder: Path, index: int, token_type: np.dtype[Any]) -> None:
        self._folder = folder
        self._index = index
        self._token_type = token_type
        self._files: dict[str, BinaryIO] = {}
        self._facts: dict[str, list[int]] = {}
        self._open_sentences = 0
        self._mark = f"{socket.gethostname()}-{os.getpid()}{UNFINISHED}"
        self.lines = 0
        self._blank = self._records = self._segments = self._tokens = self._source_crc32 = 0
        self._rejected: dict[str, int] = {}

    def __enter__(self) -> _ShardWriter:
        for kind in ("tokens", "segments", "records", "labels", "rejected"):
            faults.reach("shard.open", f"{stem(self._index)}.{kind}")
            self._files[kind] = self._own_path(kind).open("wb")
            self._facts[kind] = [0, 0]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, file in self._files.items():
            file.close()
            if kind is not None:
                faults.reach("shard.discard", f"{stem(self._index)}.{name}")
                self._own_path(name).unlink(missing_ok=True)

    def _own_path(self, kind: str) -> Path:
        return self._folder / f"{stem(self._index)}.{kind}.{self._mark}"

    def add_records(self, ids: NDArray[np.uint32], lengths: NDArray[np.int64], parsed: ParsedLines) -> None:
        """Adds finished records."""
        self._write_segments(ids, lengths)
        self._write_counts(np.asarray(parsed.segments, np.uint32))
        if parsed.labels:
            self._write("labels", np.asarray(parsed.labels, np.int64).tobytes())

    def add_sentences(self, ids: NDArray[np.uint32], lengths: NDArray[np.int64], parsed: ParsedLines) -> None:
        """Adds sentences to the open document and closes it where blank lines stand. Nothing empty is kept."""
        filled = lengths > 0
        parsed.blank += int((~filled).sum())
        self._write_segments(ids, lengths[filled])
        if not parsed.segments:
            self._open_sentences += int(filled.sum())
            return
        ends = np.cumsum(parsed.segments)
        before = np.concatenate([[0], np.cumsum(filled)])
        counts = np.diff(before[np.concatenate([[0], ends])])
        counts[0] += self._open_sentences
        self._open_sentences = int(before[-1] - before[ends[-1]])
        self._write_counts(counts[counts > 0].astype(np.uint32))

    def account(self, chunk: Chunk, blank: int) -> None:
        """Books the lines of a chunk and writes down the rejected ones."""
        for index, reason in sorted(chunk.faults.items()):
            kind = reason.partition(":")[0]
            self._rejected[kind] = self._rejected.get(kind, 0) + 1
            entry = {"line": self.lines + index + 1, "byte": chunk.offset_of(index), "reason": reason}
            self._write("rejected", (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        self.lines += len(chunk.lines)
        self._blank += blank
        self._source_crc32 = zlib.crc32(chunk.raw, self._source_crc32)

    def check_source(self, task: ShardTask, corpus_path: str) -> None:
        """Raises DataFormatError if the bytes that were read are not those of the machine that gave the work out."""
        if task.source_crc32 not in (None, self._source_crc32):
            raise DataFormatError(
                f"{corpus_path}: {task} reads differently on {socket.gethostname()} (checksum "
                f"{self._source_crc32:08x}) than where preprocess.py runs ({task.source_crc32:08x}); all machines "
                "must see the same file"
            )

    def publish(self, task: ShardTask) -> Ledger:
        """Closes the last document, syncs the files, gives them their names and writes the ledger."""
        if self._open_sentences:
            self._write_counts(np.asarray([self._open_sentences], np.uint32))
        for file in self._files.values():
            file.flush()
            faults.reach("shard.sync", file.name)
            os.fsync(file.fileno())
        faults.reach("shard.unlink", f"{stem(self._index)}.json")
        (self._folder / f"{stem(self._index)}.json").unlink(missing_ok=True)
        for kind in self._files:
            faults.reach("shard.rename", f"{stem(self._index)}.{kind}")
            self._own_path(kind).replace(self._folder / f"{stem(self._index)}.{kind}")
        files = {
            kind: FileFacts(name=f"{stem(self._index)}.{kind}", size=size, crc32=crc32)
            for kind, (size, crc32) in self._facts.items()
        }
        ledger = Ledger(
            index=self._index,
            begin=task.begin + task.shift,
            end=task.end + task.shift,
            source_crc32=self._source_crc32,
            lines=self.lines,
            kept=self.lines - self._blank - sum(self._rejected.values()),
            blank=self._blank,
            rejected=self._rejected,
            records=self._records,
            segments=self._segments,
            tokens=self._tokens,
            files=files,
        )
        write_durably(self._folder / f"{stem(self._index)}.json", to_json(asdict(ledger)))
        return ledger

    def _write_segments(self, ids: NDArray[np.uint32], lengths: NDArray[np.int64]) -> None:
        self._write("tokens", ids.astype(self._token_type).tobytes())
        self._write("segments", lengths.astype(np.uint32).tobytes())
        self._segments += len(lengths)
        self._tokens += len(ids)

    def _write_counts(self, counts: NDArray[np.uint32]) -> None:
        self._write("records", counts.tobytes())
        self._records += len(counts)

    def _write(self, kind: str, content: bytes) -> None:
        faults.write("shard.write", self._files[kind], content, f"{stem(self._index)}.{kind}")
        facts = self._facts[kind]
        facts[0] += len(content)
        facts[1] = zlib.crc32(content, facts[1])
