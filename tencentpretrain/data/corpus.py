"""Reads a corpus in ranges of bytes: text, JSON lines or TSV; plain, gzip or zstandard.

A line ends at LF, CR LF or CR and nowhere else. Every line comes out exactly once: as text, as a blank, or as a fault.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tencentpretrain.errors import DataFormatError
from tencentpretrain.sniff import describe_file

CHUNK_BYTES = 1 << 20
"""Bytes that are decoded and tokenised at a time, more only where one line is longer."""

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BLANK_LINE = re.compile(rb"\n[ \t\r\f\v]*\n")
_BOM = b"\xef\xbb\xbf"
_ARCHIVES = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstandard"}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus file as it was found: its size and time tell later whether it was edited meanwhile."""

    path: Path
    size: int
    mtime_ns: int
    compression: str | None

    def check_unchanged(self) -> None:
        """Raises DataFormatError if the file is no longer the one that was opened."""
        try:
            stat = self.path.stat()
        except OSError as error:
            raise DataFormatError(f"{self.path}: the corpus vanished while it was read ({error.strerror})") from None
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataFormatError(
                f"{self.path}: the corpus was changed while it was read ({self.size} bytes, now {stat.st_size}); "
                "run the command again once the file is complete"
            )


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some consecutive lines.

    Attributes:
        lines: their text without line ends, stripped of blanks at both ends; None where a line is not usable.
        faults: why, by index into `lines`.
        raw, offset: the bytes and where they begin in the (decompressed) corpus.
    """

    lines: list[str | None]
    faults: dict[int, str]
    raw: bytes
    offset: int
    _starts: list[int] = field(default_factory=list)

    def offset_of(self, index: int) -> int:
        """Returns the byte offset in the corpus at which line `index` begins."""
        if not self._starts:
            self._starts.extend([0, *(match.end() for match in _LINE_END.finditer(self.raw))])
        return self.offset + self._starts[index]


def open_corpus(path: str | Path) -> Corpus:
    """Looks at a corpus file before anything is read.

    Raises:
        DataFormatError: it is missing, empty, or evidently not UTF-8 text.
    """
    path = Path(path)
    try:
        stat = path.stat()
        if path.is_dir():
            raise DataFormatError(f"{path}: the corpus must be a file, but this is a directory")
        description = describe_file(path)
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError as error:
        raise DataFormatError(f"{path}: the corpus cannot be read ({error.strerror})") from None
    if stat.st_size == 0:
        raise DataFormatError(f"{path}: the corpus is empty")
    compression = next((kind for magic, kind in _ARCHIVES.items() if head.startswith(magic)), None)
    if compression is None and description is not None and not _mostly_text(head):
        raise DataFormatError(f"{path}: the corpus must be UTF-8 text (plain, .gz or .zst), but this is {description}")
    return Corpus(path=path, size=stat.st_size, mtime_ns=stat.st_mtime_ns, compression=compression)


def _mostly_text(head: bytes) -> bool:
    """Says whether most lines at the beginning of a file are text."""
    if _ARCHIVE_OR_PAGE.match(head):
        return False
    body, _, cut = head.rpartition(b"\n") if len(head) == 1 << 16 else (head, b"", b"")
    chunk = decode_chunk(body or cut, 0)
    filled = sum(line != "" for line in chunk.lines)
    return len(chunk.faults) * 2 < filled


_ARCHIVE_OR_PAGE = re.compile(
    rb"version https://git-lfs|BZh|\xfd7zXZ|%PDF-|\x89|\xff|\xfe|PK\x03\x04|\x80[\x02-\x05]|\x7fELF|GGUF|SQLite format"
    rb"|\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b",
    re.IGNORECASE | re.DOTALL,
)


def cut_ranges(corpus: Corpus, shard_bytes: int, *, documents: bool) -> list[tuple[int, int]]:
    """Cuts a plain corpus into ranges of about `shard_bytes` that end behind a line, or behind a blank line.

    The cuts follow from the content alone, so they are the same for any number of workers.
    """
    pattern = _BLANK_LINE if documents else re.compile(rb"\n")
    ranges, begin = [], 0
    with corpus.path.open("rb") as file:
        while begin < corpus.size:
            end = corpus.size
            if begin + shard_bytes < corpus.size:
                end = min(_next_cut(file, begin + shard_bytes, pattern) or corpus.size, corpus.size)
            ranges.append((begin, end))
            begin = end
    return ranges


def _next_cut(file: IO[bytes], position: int, pattern: re.Pattern[bytes]) -> int | None:
    overlap = 4096  # a blank line of more blanks than this is no place to cut
    file.seek(position)
    tail = b""
    while block := file.read(CHUNK_BYTES):
        window = tail + block
        if match := pattern.search(window):
            return position - len(tail) + match.end()
        tail = window[-overlap:]
        position += len(block)
    return None


def cut_stream(corpus: Corpus, shard_bytes: int, *, documents: bool) -> Iterator[Iterator[bytes]]:
    """Cuts a compressed corpus as `cut_ranges` would cut its content; each range must be consumed before the next."""
    pattern = _BLANK_LINE if documents else re.compile(rb"\n")
    pieces = _decompress(corpus)
    rest = next(pieces, b"")

    def one_range() -> Iterator[bytes]:
        nonlocal rest
        size, tail, block = 0, b"", rest
        rest = b""
        while block:
            if size + len(block) > shard_bytes:
                skip = max(shard_bytes - size, 0)
                window = tail + block if skip == 0 else block
                searched = 0 if skip == 0 else skip
                if match := pattern.search(window, searched):
                    cut = match.end() - (len(window) - len(block))
                    yield block[:cut]
                    rest = block[cut:] or next(pieces, b"")
                    return
                tail = window[max(searched, len(window) - 4096) :]
            size += len(block)
            yield block
            block = next(pieces, b"")

    while rest:
        yield one_range()


def _decompress(corpus: Corpus) -> Iterator[bytes]:
    """Yields the content of a gzip or zstandard file in pieces; never an empty one."""
    try:
        if corpus.compression == "gzip":
            with gzip.open(corpus.path, "rb") as stream:
                while piece := stream.read(CHUNK_BYTES):
                    yield piece
        else:
            yield from _decompress_zstandard(corpus)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataFormatError(
            f"{corpus.path}: the compressed corpus is damaged or cut off ({error}); fetch or compress it again"
        ) from None


def _decompress_zstandard(corpus: Corpus) -> Iterator[bytes]:
    import zstandard

    fresh = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    with corpus.path.open("rb") as file:
        frame, data = fresh.decompressobj(), b""
        try:
            while data := data or file.read(1 << 16):
                if piece := frame.decompress(data):
                    yield piece
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = fresh.decompressobj()
                    if not data and not (data := file.read(1 << 16)):
                        return
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
    raise EOFError("the last frame has no end")


def read_chunks(file: IO[bytes], begin: int, end: int, *, shift: int = 0) -> Iterator[Chunk]:
    """Yields the lines of a range of bytes.

    Args:
        file: where the range lies.
        begin, end: the range; it begins at the beginning of a line.
        shift: what to add to a position in `file` for the offset in the corpus.
    """
    file.seek(begin)
    carried: list[bytes] = []
    start = position = begin
    while position < end:
        block = file.read(min(CHUNK_BYTES, end - position))
        if not block:
            raise DataFormatError(
                f"{getattr(file, 'name', 'the corpus')}: the file ends at byte {position}, before {end}"
            )
        position += len(block)
        # A CR in the last place may be the first half of CR LF, so it is no place to cut.
        cut = len(block) if position == end else max(block.rfind(b"\n"), block.rfind(b"\r", 0, len(block) - 1)) + 1
        if not cut:
            carried.append(block)
            continue
        raw = b"".join([*carried, block[:cut]])
        yield decode_chunk(raw, start + shift)
        start += len(raw)
        carried = [block[cut:]] if cut < len(block) else []


def decode_chunk(raw: bytes, offset: int) -> Chunk:
    """Decodes whole lines, strictly; a line that is not UTF-8 or contains NUL is a fault of its own."""
    data = raw
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    data = data[:-1] if data.endswith(b"\n") else data
    faults: dict[int, str] = {}
    lines: list[str | None]
    try:
        text = data.decode("utf-8")
        if "\0" in text:
            raise ValueError
        if "\ufeff" in text:  # a byte-order mark, of this file or of one that was appended to it
            lines = [line.lstrip("\ufeff").strip() for line in text.split("\n")]
        else:
            lines = [line.strip() for line in text.split("\n")]
    except ValueError:
        lines = []
        for index, line in enumerate(data.split(b"\n")):
            try:
                decoded = line.removeprefix(_BOM).decode("utf-8")
            except UnicodeDecodeError as error:
                faults[index] = f"not UTF-8: byte 0x{error.object[error.start]:02x} in column {error.start + 1}"
                lines.append(None)
                continue
            if "\0" in decoded:
                faults[index] = "contains a NUL character"
                lines.append(None)
            else:
                lines.append(decoded.strip())
    return Chunk(lines=lines, faults=faults, raw=raw, offset=offset)
