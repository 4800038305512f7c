"""Directories that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tencentpretrain.data.durable import storage_errors, sync_folder, write_durably

UNFINISHED = ".unfinished-"
"""Start of the names of directories that a process was writing or deleting when it ended."""


def publish_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a directory beside `path`, flushes it to the disk and gives it its name.

    The order is: files, directory, rename, parent directory, each synchronised before the next. When `write` fails
    nothing is left.

    Raises:
        FileExistsError: there is something under that name already.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.parent / f"{UNFINISHED}{path.name}-{os.getpid()}"
    shutil.rmtree(place, ignore_errors=True)
    try:
        place.mkdir()
        write(place)
        for file in place.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        sync_folder(place)
        place.rename(path)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    sync_folder(path.parent)


def remove_directory(path: Path) -> None:
    """Deletes a directory; it loses its name first, so that no reader meets half of it."""
    place = path.parent / f"{UNFINISHED}{path.name}-{os.getpid()}"
    shutil.rmtree(place, ignore_errors=True)
    path.rename(place)
    sync_folder(path.parent)
    shutil.rmtree(place, ignore_errors=True)


def move_aside(path: Path, folder: Path) -> Path:
    """Moves a file or directory into `folder` under a name that is free, and returns where it is now."""
    folder.mkdir(parents=True, exist_ok=True)
    name = path.name.removeprefix(UNFINISHED)
    number = 0
    while (target := folder / (f"{name}-{number}" if number else name)).exists():
        number += 1
    path.rename(target)
    return target


def write_text(path: str | Path, text: str) -> None:
    """Writes a file of text, whole or not at all, making its folder.

    Raises:
        ResourceError: the disk is full or the place cannot be written.
    """
    path, content = Path(path), text.encode()
    with storage_errors(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, content)
