"""The tokenised corpus on disk: a directory that describes itself, checked as it is read, mapped into memory.

A record is an optional label and a list of segments of token ids, without special tokens. `header.json` says what
the records are and which files hold them; `shard-*.tokens` hold the ids; `segments`, `records` and `labels` index them:
segment i is the tokens segments[i]:segments[i + 1] of all shards one after the other, record r the segments
records[r]:records[r + 1].
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tencentpretrain.data.durable import to_json
from tencentpretrain.data.records import Layout
from tencentpretrain.errors import DataFormatError
from tencentpretrain.sniff import describe_file
from tencentpretrain.tokenizers.base import Tokenizer

FORMAT = "tencentpretrain store"
VERSION = 1
HEADER = "header.json"

TokenArray = NDArray[np.unsignedinteger[Any]]
IndexArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What identifies the tokenizer of a store."""

    name: str
    source: str
    fingerprint: str
    vocab_size: int
    special_ids: dict[str, int | None]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerFacts:
        special = tokenizer.special
        return cls(
            name=type(tokenizer).__name__,
            source=Path(tokenizer.source).name,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            special_ids={
                "pad": special.pad_id,
                "unk": special.unk_id,
                "cls": special.cls_id,
                "sep": special.sep_id,
                "mask": special.mask_id,
                "sentinel": special.sentinel_id,
            },
        )

    def __str__(self) -> str:
        return f"{self.name} {self.source} ({self.vocab_size} tokens, {self.fingerprint[:12]})"


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """Size and checksum (CRC-32) of one file of a store."""

    name: str
    size: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Account:
    """Where the lines of a corpus went: lines = kept + blank + the sum of rejected."""

    lines: int = 0
    kept: int = 0
    blank: int = 0
    rejected: dict[str, int]

    @property
    def total_rejected(self) -> int:
        return sum(self.rejected.values())

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.rejected.items()))
        rejected = f"{self.total_rejected:,} rejected" + (f" ({reasons})" if reasons else "")
        return f"{self.lines:,} lines read = {self.kept:,} kept + {self.blank:,} blank + {rejected}"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a store says about itself.

    Attributes:
        layout: "sentences", "lines", "pairs" or "labelled".
        processor: the data processor it was made for; every processor of the same layout can use it.
        inputs: what the store was made from (sources, formats, sizes of shards): equal inputs give equal bytes.
        settings: how samples are to be drawn, as `preprocess.py` was told; `pretrain.py` may say otherwise.
        token_type: NumPy name of the type of a token id.
        num_tokens: tokens of each shard, in order; shard i is in `shards[i]`.
    """

    layout: Layout
    processor: str
    tokenizer: TokenizerFacts
    tgt_tokenizer: TokenizerFacts | None
    inputs: dict[str, Any]
    settings: dict[str, Any]
    token_type: str
    num_records: int
    num_segments: int
    num_tokens: list[int]
    account: Account
    shards: list[FileFacts]
    index: list[FileFacts]

    def to_bytes(self) -> bytes:
        """Returns the content of `header.json`, which carries a checksum of itself."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return to_json({**content, "crc32": zlib.crc32(to_json(content))})

    @classmethod
    def from_bytes(cls, content: bytes, path: Path) -> Header:
        """Reads `header.json`.

        Raises:
            DataFormatError: it is damaged, not a header, or of another version.
        """
        try:
            values = json.loads(content)
            if values.pop("format") != FORMAT:
                raise KeyError("format")
            version = values["version"]
            if version != VERSION:
                raise DataFormatError(f"{path}: the store has version {version}, but this program reads {VERSION}")
            checksum = values.pop("crc32")
            if zlib.crc32(to_json({"format": FORMAT, **values})) != checksum:
                raise DataFormatError(f"{path}: the header is damaged (its checksum does not fit); preprocess again")
            del values["version"]
            tgt = values.pop("tgt_tokenizer")
            return cls(
                tokenizer=TokenizerFacts(**values.pop("tokenizer")),
                tgt_tokenizer=TokenizerFacts(**tgt) if tgt else None,
                account=Account(**values.pop("account")),
                shards=[FileFacts(**facts) for facts in values.pop("shards")],
                index=[FileFacts(**facts) for facts in values.pop("index")],
                **values,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataFormatError(f"{path}: not a readable header of a store ({error}); preprocess again") from None


class Store:
    """A tokenised corpus, read through memory maps.

    Each shard's checksum is verified when the shard is first touched, those of the index when the store is opened.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.header = header
        self.token_type = np.dtype(header.token_type)
        bases = np.zeros(len(header.shards) + 1, np.int64)
        np.cumsum(header.num_tokens, out=bases[1:])
        self._bases = bases
        self._shards: list[TokenArray | None] = [None] * len(header.shards)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Store:
        """Opens a store, checking the size of every file.

        Args:
            path: the store's directory.
            verify: also check all checksums now, instead of each at first use.

        Raises:
            DataFormatError: there is no store, or it is damaged; the message names the file.
        """
        path = Path(path)
        header_path = path / HEADER
        try:
            header = Header.from_bytes(header_path.read_bytes(), header_path)
        except OSError:
            raise DataFormatError(_no_store(path)) from None
        for facts in [*header.shards, *header.index]:
            _check_size(path / facts.name, facts)
        store = cls(path, header)
        for facts in header.index:
            _check_sum(path / facts.name, facts)
        if verify:
            for facts in header.shards:
                _check_sum(path / facts.name, facts)
        return store

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content: the tokens, their arrangement and the tokenizers."""
        header = self.header
        content = {
            "layout": header.layout,
            "tokenizers": [header.tokenizer.fingerprint, header.tgt_tokenizer and header.tgt_tokenizer.fingerprint],
            "files": [[facts.size, facts.crc32] for facts in [*header.shards, *header.index]],
        }
        return hashlib.sha256(to_json(content)).hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """How samples are to be drawn, as `preprocess.py` was told."""
        return self.header.settings

    def __len__(self) -> int:
        return self.header.num_records

    @property
    def num_tokens(self) -> int:
        """The number of tokens in all records."""
        return int(self._bases[-1])

    @cached_property
    def segment_offsets(self) -> IndexArray:
        """(segments + 1,) where each segment begins among all tokens."""
        return self._index("segments")

    @cached_property
    def record_offsets(self) -> IndexArray:
        """(records + 1,) where each record begins among all segments."""
        return self._index("records")

    @cached_property
    def labels(self) -> IndexArray:
        """(records,) the class of each record; empty unless the layout is "labelled"."""
        return self._index("labels")

    def tokens(self, begin: int, end: int) -> TokenArray:
        """Returns the tokens `begin`:`end` of all shards one after the other, as a read-only view where possible."""
        if begin >= end:
            return np.zeros(0, self.token_type)
        first = int(np.searchsorted(self._bases, begin, side="right")) - 1
        base = int(self._bases[first])
        if end <= self._bases[first + 1]:
            return self._shard(first)[begin - base : end - base]
        cut = int(self._bases[first + 1])
        return np.concatenate([self._shard(first)[begin - base :], self.tokens(cut, end)])

    def segment(self, index: int) -> TokenArray:
        """Returns the tokens of one segment."""
        return self.tokens(int(self.segment_offsets[index]), int(self.segment_offsets[index + 1]))

    def verify(self) -> None:
        """Checks every checksum.

        Raises:
            DataFormatError: a file is damaged; the message names it.
        """
        for facts in [*self.header.shards, *self.header.index]:
            _check_sum(self.path / facts.name, facts)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "header": self.header}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["header"])  # type: ignore[misc]

    def _shard(self, index: int) -> TokenArray:
        shard = self._shards[index]
        if shard is None:
            facts = self.header.shards[index]
            _check_sum(self.path / facts.name, facts)
            shard = _map(self.path / facts.name, self.token_type)
            self._shards[index] = shard
        return shard

    def _index(self, name: str) -> IndexArray:
        return _map(self.path / name, np.dtype(np.int64))


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if not path.exists() or path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _check_size(path: Path, facts: FileFacts) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != facts.size:
        found = "is missing" if size is None else f"has {size:,} bytes"
        raise DataFormatError(
            f"{path}: this part of the data set {found}, but should have {facts.size:,} bytes; preprocess again"
        )


def _check_sum(path: Path, facts: FileFacts) -> None:
    _check_size(path, facts)
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    if checksum != facts.crc32:
        raise DataFormatError(
            f"{path}: this part of the data set is damaged (checksum {checksum:08x}, expected {facts.crc32:08x}); "
            "preprocess again"
        )


def _no_store(path: Path) -> str:
    partial = path.with_name(path.name + ".partial")
    if partial.is_dir() and not path.exists():
        return f"{path}: preprocessing of this data set has not finished; run the same preprocess.py command again"
    if not path.exists():
        return f"{path}: there is no data set here; make one with preprocess.py --dataset_path {path}"
    what = "a directory without header.json" if path.is_dir() else describe_file(path) or "a file"
    return f"{path}: this is not a data set of preprocess.py but {what}"
