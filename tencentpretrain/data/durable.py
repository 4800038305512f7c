"""Writes that survive a crash, and a full disk said in a sentence."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tencentpretrain.errors import ResourceError


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file that is either complete under its name or absent."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def to_json(value: Any) -> bytes:
    """Returns JSON bytes that depend on the value alone."""
    return (json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()


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
            folder = next(parent for parent in [path, *path.parents] if parent.exists())
            free = shutil.disk_usage(folder).free
            raise ResourceError(
                f"{path}: the disk is full: about {needed:,} more bytes are needed, {free:,} are free; "
                "free some space and run the same command again, finished parts are kept"
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO, errno.ESTALE):
            raise ResourceError(f"{path}: cannot be written ({os.strerror(error.errno)})") from None
        raise
