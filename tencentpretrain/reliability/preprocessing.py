"""I1, I3, I4, I6: no line of a corpus is lost whatever is in it, whoever reads it, and whoever dies."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tencentpretrain.config.data import CorpusConfig
from tencentpretrain.data.build import build_store
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.data.store import Store
from tencentpretrain.errors import DataFormatError, ResourceError
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability.row import Row, Scale
from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer
from tencentpretrain.tokenizers.base import Tokenizer

_WORDS = tuple(f"word{number}" for number in range(100))
_PROCESSOR_OF: dict[RecordFormat, str] = {
    "lines": "lm",
    "sentences": "bert",
    "json_lines": "llm_pretrain",
    "tsv_pairs": "prefixlm",
    "instructions": "llm_sft",
    "labelled": "cls",
}
_PIECES = (
    *(word.encode() for word in _WORDS[:12]), b" ", b"\t", b"\t\t", "中文".encode(), b"\xe2\x80\xa8", b"\xef\xbb\xbf",
    b"\xc2\xa0", b"{", b'{"text": "a"}', b"1\tgood", b"a\tb", b'{"instruction": "a", "output": "b"}', b"\x0b", b"\x1c",
)  # fmt: skip
_SPOILT = (b"\xff", b"\0", b"\xed\xa0\x80", b"\xc3", b"\xf0\x9f", "text".encode("utf-16"), b'{"text": "\\ud800"}')
_ENDS = (b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b"\n\r\n\n")

MakeTokenizer = Callable[[], Tokenizer]


@ROWS.register("I1")
def check_broken_text(scale: Scale, folder: Path) -> Row:
    """Generated corpora of every format and kind of damage; the lines are counted again from the bytes alone."""
    corpora, counts = (200, (1, 2, 3, 8)) if scale == "full" else (40, (1,))
    tokenizer = _tokenizer(folder)
    draw = random.Random(1)
    formats = tuple(_PROCESSOR_OF)
    lines = rejected = refused = balanced = 0
    wrong: list[str] = []
    for number in range(corpora):
        content = _broken(draw, number)
        path = folder / "corpus.txt"
        path.write_bytes(content)
        record_format = formats[number % len(formats)]
        digests = set()
        found: list[str] = []
        for processes in counts:
            output = folder / f"store-{number}-{processes}"
            try:
                store = _build(path, output, record_format, tokenizer, processes, max(300, len(content) // 30))
            except DataFormatError as error:
                digests.add(str(error))
                if str(path) not in str(error) or output.exists():
                    found.append(f"refused without its name, or something is left: {error}")
                refused += processes == counts[0]
                continue
            digests.add(_digest(output))
            found += _imbalance(store, content, record_format)
            if processes == counts[0]:
                lines += store.header.account.lines
                rejected += store.header.account.total_rejected
            shutil.rmtree(output)
        if len(digests) != 1:
            found.append("the number of processes makes a difference")
        balanced += not found
        wrong += [f"corpus {number} ({record_format}): {text}" for text in found]
    return Row(
        name="I1",
        promised="lines read = kept + blank + rejected, each rejected one with line, byte and reason, for any number "
        "of processes: 100 %",
        reached=f"{balanced}/{corpora} corpora x {', '.join(map(str, counts))} processes balanced: {lines:,} lines, "
        f"{rejected:,} rejected, {refused} corpora refused as a whole" + _some(wrong),
        passed=balanced == corpora and rejected > 0,
    )


@ROWS.register("I3")
def check_worker_counts(scale: Scale, folder: Path) -> Row:
    """The same corpus with other numbers of processes, plain and packed."""
    counts = (1, 2, 3, 5, 8, 16, 40) if scale == "full" else (1, 3)
    tokenizer = _tokenizer(folder)
    path = folder / "corpus.txt"
    text = _documents(random.Random(3), 3000 if scale == "full" else 300)
    path.write_text(text, encoding="utf-8")
    sentences = sum(line != "" for line in text.split("\n"))
    digests = set()
    lost = 0
    for processes in counts:
        output = folder / f"store-{processes}"
        store = _build(path, output, "sentences", tokenizer, processes, shard_bytes=len(text) // 60)
        lost += abs(store.header.num_segments - sentences) + abs(store.header.account.kept - sentences)
        digests.add(_digest(output))
    return Row(
        name="I3",
        promised="files identical for every number of processes, no sentence lost",
        reached=f"{len(digests)} different output(s) of {len(counts)} numbers of processes "
        f"({', '.join(map(str, counts))}), {lost} of {sentences:,} sentences lost",
        passed=len(digests) == 1 and lost == 0,
    )


@ROWS.register("I4")
def check_dying_workers(scale: Scale, folder: Path) -> Row:
    """Kills one worker at random, then one that raises; the same command is given again each time."""
    kills, processes = (100, 8) if scale == "full" else (3, 3)
    draw = random.Random(4)
    tokenizer = _tokenizer(folder)
    path = folder / "corpus.txt"
    path.write_text(_documents(draw, 400), encoding="utf-8")
    build = functools.partial(_build, path, record_format="sentences", shard_bytes=path.stat().st_size // 24)
    build(folder / "alone", tokenizer=tokenizer, processes=1)
    expected = _digest(folder / "alone")
    struck = held = 0
    wrong: list[str] = []
    while struck < kills:
        output = folder / f"store-{struck}"
        try:
            build(output, tokenizer=_Slow(tokenizer), processes=processes, reporter=_Killer(draw))
        except ResourceError as error:
            said = str(error)
        else:  # the worker killed had no work any more
            if _digest(output) != expected:
                wrong.append("other output though the worker killed had no work")
            shutil.rmtree(output)
            continue
        struck += 1
        named = re.search(r"was killed by SIGKILL.* at shard (\d+) \(bytes .*after line ([\d,]+)", said)
        partial = output.with_name(output.name + ".partial")
        finished = _stamps(partial) if not output.exists() else {}
        missing = {index for index in range(len(list(output.parent.glob("alone/*.tokens")))) if index not in finished}
        # A worker that dies behind the last line of its shard may have published it without a word.
        known = named is not None and _is_unfinished(partial, int(named[1]), int(named[2].replace(",", "")))
        build(output, tokenizer=tokenizer, processes=processes)
        redone = {index for index, stamp in _stamps(output).items() if finished.get(index) != stamp}
        if known and redone == missing and _digest(output) == expected:
            held += 1
        else:
            wrong.append(f"kill {struck}: {sorted(missing)} were missing, {sorted(redone)} made again: {said}")
    raised = _check_raising(folder, path, tokenizer, processes)
    return Row(
        name="I4",
        promised="the shard and its line are reported, only unpublished shards are made again, output identical: 100 %",
        reached=f"{held}/{kills} kills of one of {processes} workers; a raising tokenizer "
        + ("is reported with shard, line and byte" if raised else "is not reported well")
        + _some(wrong),
        passed=held == kills and raised and not wrong,
    )


@ROWS.register("I6")
def check_store_damage(scale: Scale, folder: Path) -> Row:
    """Flips single bits of a store's files and cuts them off."""
    flips, cuts = (10_000, 20) if scale == "full" else (300, 3)
    draw = random.Random(6)
    path = folder / "corpus.txt"
    labelled = "\n".join(f"{draw.randint(0, 3)}\t{' '.join(draw.choices(_WORDS, k=9))}" for _ in range(60))
    path.write_text(labelled + "\n", encoding="utf-8")
    store = _build(path, folder / "store", "labelled", _tokenizer(folder), 1, shard_bytes=1200).path
    files = sorted(file for file in store.iterdir() if file.name != "rejected.jsonl" and file.stat().st_size)
    sizes = [file.stat().st_size for file in files]
    caught = cut = 0
    wrong: list[str] = []
    for _ in range(flips):
        file = draw.choices(files, sizes)[0]
        content = bytearray(file.read_bytes())
        place = draw.randrange(len(content) * 8)
        content[place // 8] ^= 1 << place % 8
        said = _said_of(store, file, bytes(content))
        caught += file.name in said
        wrong += [] if file.name in said else [f"bit {place} of {file.name}: {said or 'not noticed'}"]
    for file in files:
        whole = file.read_bytes()
        for length in [0, *(draw.randrange(len(whole)) for _ in range(cuts))]:
            said = _said_of(store, file, whole[:length])
            cut += file.name in said
            wrong += [] if file.name in said else [f"{file.name} cut to {length}: {said or 'not noticed'}"]
    num_cuts = len(files) * (cuts + 1)
    return Row(
        name="I6",
        promised="flipped bits and cut files are noticed when opened or read, and the file is named: 100 %",
        reached=f"{caught:,}/{flips:,} flips, {cut}/{num_cuts} cuts in {len(files)} files" + _some(wrong),
        passed=caught == flips and cut == num_cuts,
    )


def _tokenizer(folder: Path) -> MakeTokenizer:
    path = folder / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]) + "\n", encoding="utf-8")
    return functools.partial(build_tokenizer, TokenizerConfig(tokenizer="space", vocab_path=str(path)))


def _build(
    path: Path,
    output: Path,
    record_format: RecordFormat,
    tokenizer: MakeTokenizer,
    processes: int,
    shard_bytes: int = 300,
    reporter: Any = None,
) -> Store:
    config = CorpusConfig(corpus_path=str(path), shard_bytes=shard_bytes, processes_num=processes, max_rejected=1.0)
    processor = _PROCESSOR_OF[record_format]
    return build_store(
        config, output, processor=processor, record_format=record_format, tokenizer=tokenizer, reporter=reporter
    ).store


def _documents(draw: random.Random, count: int) -> str:
    def sentence() -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(2, 20)))

    return "\n\n".join("\n".join(sentence() for _ in range(draw.randint(1, 6))) for _ in range(count)) + "\n"


def _broken(draw: random.Random, number: int) -> bytes:
    """Returns a corpus with damage of many kinds; some are damaged as a whole."""
    if number % 40 == 7:
        return b""
    if number % 40 == 17:
        return "\n".join(_WORDS).encode("utf-16")
    if number % 40 == 27:  # a line longer than many shards
        return b" ".join(_WORDS[draw.randrange(100)].encode() for _ in range(200_000)) + b"\nword1"
    if number % 40 == 37:
        return b"a\n" * 100_000
    share = draw.choice((0.0, 0.01, 0.1, 0.4))
    parts = []
    for _ in range(draw.randint(1, 200)):
        line = [draw.choice(_PIECES) for _ in range(draw.choice((0, 1, 1, 2, 3, 8)))]
        if draw.random() < share:
            line.insert(draw.randint(0, len(line)), draw.choice(_SPOILT))
        parts.append(b"".join(line) + draw.choice(_ENDS))
    content = b"".join(parts)
    return content.rstrip(b"\r\n") if draw.random() < 0.5 else content


def _imbalance(store: Store, content: bytes, record_format: RecordFormat) -> Iterator[str]:
    """Counts the lines again and compares them with the account and the list of the rejected ones."""
    account = store.header.account
    lines = re.split(rb"\r\n|\n|\r", content)
    begins = [0, *(match.end() for match in re.finditer(rb"\r\n|\n|\r", content))]
    if lines[-1] == b"":
        lines.pop()
    if account.lines != len(lines):
        yield f"{account.lines} lines read of {len(lines)}"
    if account.kept + account.blank + account.total_rejected != account.lines:
        yield f"does not balance: {account}"
    entries = [json.loads(line) for line in (store.path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    if len(entries) != account.total_rejected:
        yield f"{len(entries)} rejected lines are listed of {account.total_rejected}"
    if any(begins[entry["line"] - 1] != entry["byte"] or not entry["reason"] for entry in entries):
        yield "a rejected line is listed in the wrong place"
    listed = {entry["line"] - 1 for entry in entries}
    unusable = {index for index, line in enumerate(lines) if not _is_text(line)}
    if not (unusable <= listed if record_format not in ("lines", "sentences") else unusable == listed):
        yield f"lines {sorted(unusable ^ listed)[:3]} are rejected wrongly, or not"
    if record_format == "lines" and account.kept != store.header.num_records:
        yield f"{store.header.num_records} records of {account.kept} lines"


def _is_text(line: bytes) -> bool:
    with contextlib.suppress(UnicodeDecodeError):
        return "\0" not in line.decode("utf-8")
    return False


def _digest(folder: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()


class _Slow:
    """Makes a tokenizer that leaves time to kill its process."""

    def __init__(self, make: MakeTokenizer) -> None:
        self._make = make

    def __call__(self) -> Tokenizer:
        tokenizer = self._make()
        encode = tokenizer.encode_packed

        def slowly(texts: Any) -> Any:
            time.sleep(0.02)
            return encode(texts)

        tokenizer.encode_packed = slowly  # type: ignore[method-assign]
        return tokenizer


class _Raising(_Slow):
    """Makes a tokenizer that cannot stand one text."""

    def __call__(self) -> Tokenizer:
        tokenizer = self._make()
        encode = tokenizer.encode_packed

        def strictly(texts: Any) -> Any:
            if any("word0 word0 word0" in text for text in texts):
                raise KeyError("word0")
            return encode(texts)

        tokenizer.encode_packed = strictly  # type: ignore[method-assign]
        return tokenizer


class _Killer:
    """A reporter that kills one worker at a random moment."""

    def __init__(self, draw: random.Random) -> None:
        self._left = draw.randint(1, 20)
        self._draw = draw

    def start(self, total_bytes: int, done_bytes: int) -> None: ...

    def advance(self, num_bytes: int, lines: int, tokens: int) -> None:
        self._left -= 1
        if self._left == 0:
            victim = self._draw.choice(multiprocessing.active_children())
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)


def _is_unfinished(partial: Path, index: int, lines_done: int) -> bool:
    """Says whether a shard is not published, or a worker was past all its lines."""
    ledger = partial / f"shard-{index:05d}.json"
    return not ledger.exists() or json.loads(ledger.read_bytes())["lines"] == lines_done


def _stamps(folder: Path) -> dict[int, int]:
    """Returns when each finished shard of a store, or of an unfinished one, was written."""
    ledgers = {path.stem for path in folder.glob("shard-*.json")}
    unfinished = folder.suffix == ".partial"
    return {
        int(path.stem.removeprefix("shard-")): path.stat().st_mtime_ns
        for path in folder.glob("shard-*.tokens")
        if path.stem in ledgers or not unfinished
    }


def _check_raising(folder: Path, path: Path, tokenizer: MakeTokenizer, processes: int) -> bool:
    content = path.read_bytes() + b"\nword1\nword0 word0 word0\n"
    path.write_bytes(content)
    byte = content.index(b"word0 word0 word0")
    try:
        _build(path, folder / "raised", "sentences", _Raising(tokenizer), processes, len(content) // 24)
    except RuntimeError as error:
        place = rf"shard \d+ \(bytes .* failed at line [\d,]+ of it \(byte {byte:,} of the corpus\): KeyError"
        return bool(re.search(place, str(error))) and not (folder / "raised").exists()
    return False


def _said_of(store: Path, file: Path, content: bytes) -> str:
    """Returns what is said of a store one of whose files has another content for a moment."""
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        found = Store.open(store)
        found.tokens(0, found.num_tokens)
    except DataFormatError as error:
        return str(error)
    finally:
        file.write_bytes(whole)
    return ""


def _some(wrong: list[str]) -> str:
    return "".join(f"; {text}" for text in wrong[:3])
