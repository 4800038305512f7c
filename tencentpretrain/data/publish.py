"""The last step of a build: index files, header, and the folder's final name."""

from __future__ import annotations

import functools
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tencentpretrain import faults
from tencentpretrain.data.durable import sync_folder, write_durably
from tencentpretrain.data.shards import Ledger
from tencentpretrain.data.store import HEADER, Account, FileFacts, Header

REJECTED = "rejected.jsonl"
INPUTS = "inputs.json"


def write_index(
    folder: Path, header: Header, ledgers: list[Ledger], rejected_entries: Iterable[dict[str, Any]], content: str
) -> Header:
    """Joins the shards' lengths to offsets over the whole store, lists the rejected lines, and completes the header.

    Args:
        content: the digest of the corpus.
    """
    index = [
        _write_offsets(folder, "segments", [ledger.files["segments"].name for ledger in ledgers]),
        _write_offsets(folder, "records", [ledger.files["records"].name for ledger in ledgers]),
        _write_joined(folder, "labels", [ledger.files["labels"].name for ledger in ledgers]),
    ]
    rejected: dict[str, int] = {}
    for ledger in ledgers:
        for reason, count in ledger.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
    faults.reach("rejected.open", folder / REJECTED)
    with (folder / REJECTED).open("wb") as file:
        for entry in rejected_entries:
            line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
            faults.write("rejected.write", file, line, folder / REJECTED)
        file.flush()
        faults.reach("rejected.sync", folder / REJECTED)
        os.fsync(file.fileno())
    return replace(
        header,
        inputs={**header.inputs, "content": content},
        num_records=sum(ledger.records for ledger in ledgers),
        num_segments=sum(ledger.segments for ledger in ledgers),
        num_tokens=[ledger.tokens for ledger in ledgers],
        account=Account(
            lines=sum(ledger.lines for ledger in ledgers),
            kept=sum(ledger.kept for ledger in ledgers),
            blank=sum(ledger.blank for ledger in ledgers),
            rejected=rejected,
        ),
        shards=[ledger.files["tokens"] for ledger in ledgers],
        index=index,
    )


class _IndexFile:
    """An index file that is written in pieces, with its size and checksum."""

    def __init__(self, path: Path) -> None:
        self._path = path
        faults.reach("index.open", path)
        self._file = path.open("wb")
        self._size = self._crc32 = 0

    def write(self, content: bytes) -> None:
        faults.write("index.write", self._file, content, self._path)
        self._size += len(content)
        self._crc32 = zlib.crc32(content, self._crc32)

    def finish(self) -> FileFacts:
        self._file.flush()
        faults.reach("index.sync", self._path)
        os.fsync(self._file.fileno())
        self._file.close()
        return FileFacts(name=self._path.name, size=self._size, crc32=self._crc32)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from iter(functools.partial(file.read, 1 << 20), b"")


def _write_offsets(folder: Path, name: str, parts: list[str]) -> FileFacts:
    file, total = _IndexFile(folder / name), 0
    file.write(np.zeros(1, np.int64).tobytes())
    for part in parts:
        for piece in _pieces(folder / part):
            ends = np.cumsum(np.frombuffer(piece, np.uint32), dtype=np.int64) + total
            total = int(ends[-1])
            file.write(ends.tobytes())
    return file.finish()


def _write_joined(folder: Path, name: str, parts: list[str]) -> FileFacts:
    file = _IndexFile(folder / name)
    for part in parts:
        for piece in _pieces(folder / part):
            file.write(piece)
    return file.finish()


def publish(folder: Path, output: Path, header: Header) -> None:
    """Writes the header, removes the parts that the store does not need, and gives the folder its name."""
    write_durably(folder / HEADER, header.to_bytes())
    keep = {HEADER, REJECTED, *(facts.name for facts in [*header.shards, *header.index])}
    for path in sorted(folder.iterdir(), key=lambda path: path.name == INPUTS):  # by it the next start knows the rest
        if path.name not in keep:
            faults.reach("store.unlink", path)
            path.unlink()
    sync_folder(folder)
    replaced = None
    if output.exists():  # only with --overwrite: the old content goes when the new one is in its place
        replaced = output.with_name(output.name + ".replaced")
        faults.reach("store.replace", output)
        output.rename(replaced)
    faults.reach("store.rename", output)
    folder.rename(output)
    sync_folder(output.parent)
    if replaced is not None:
        if replaced.is_dir():
            faults.reach("store.remove", replaced)
            shutil.rmtree(replaced)
        else:
            faults.reach("store.remove-file", replaced)
            replaced.unlink()
