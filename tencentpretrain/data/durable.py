"""Writes that survive a crash, and a full disk said in a sentence."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tencentpretrain import faults
from tencentpretrain.errors import ResourceError

_BLOCK = 1 << 23


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        faults.reach("folder.sync", folder)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DurableFile:
    """A new file, written from front to back; when its `with` block ends without an error its bytes are on the disk.

    Fields:
        size: bytes written so far.
        sha256: of what was given, not of what is found on the disk: damage on the way shows.
        error: what the disk answered, for writers that hide it behind errors of their own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.error: OSError | None = None
        self._digest = hashlib.sha256()
        self._pending = bytearray()
        faults.reach("file.open", path)
        self._file = path.open("wb", buffering=0)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, content: Any) -> int:
        """Takes bytes; small pieces are gathered to blocks."""
        view = memoryview(content).cast("B")
        if len(self._pending) + len(view) < _BLOCK:
            self._pending += view
        else:
            self.flush()
            for begin in range(0, len(view), _BLOCK):
                self._put(view[begin : begin + _BLOCK])
        return len(view)

    def flush(self) -> None:
        """Hands what was gathered to the operating system."""
        if self._pending:
            pending, self._pending = self._pending, bytearray()
            self._put(memoryview(pending))

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
                faults.reach("file.sync", self.path)
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def _put(self, block: memoryview) -> None:
        if self.error is not None:
            raise self.error
        self._digest.update(block)
        self.size += len(block)
        try:
            faults.write("file.write", _Whole(self._file), block, self.path)
        except OSError as error:
            self.error = error
            raise


class _Whole:
    """An unbuffered file whose writes are repeated until all bytes are taken."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, content: Any) -> None:
        view = memoryview(content)
        while view:
            view = view[self._file.write(view) :]


@contextmanager
def durable_file(path: Path) -> Iterator[DurableFile]:
    """Yields a file that takes its name when it is whole and on the disk; after an error nothing is left of it."""
    part = path.with_name(f".{path.name}.part")
    try:
        with DurableFile(part) as file:
            yield file
        faults.reach("file.rename", path)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            faults.reach("file.discard", path)
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file that is either complete under its name or absent."""
    with durable_file(path) as file:
        file.write(content)


def to_json(value: Any) -> bytes:
    """Returns JSON bytes that depend on the value alone."""
    return (json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()


def free_bytes(path: Path) -> int:
    """Returns how much room the disk has that holds `path`, or will hold it."""
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(folder).free


@contextmanager
def storage_errors(path: Path, needed: int) -> Iterator[None]:
    """Turns the failures of a disk into ResourceError with the path, what is needed and what is free.

    Args:
        path: what is being written.
        needed: bytes that are still to be written, as far as known.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"{path}: the disk is full: about {needed:,} more bytes are needed, {free_bytes(path):,} are free; "
                "free some space and run the same command again, finished parts are kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO, errno.ESTALE):
            raise ResourceError(f"{path}: cannot be written ({os.strerror(error.errno)})") from error
        raise
