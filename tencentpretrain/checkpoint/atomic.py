"""Directories that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from tencentpretrain import faults
from tencentpretrain.data.durable import storage_errors, sync_folder, write_durably

UNFINISHED = ".unfinished-"
"""Start of the names of directories that a process was writing or deleting when it ended."""

RETIRED = "-retired"
"""End of the names of directories that were published once and are being deleted."""


def publish_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a directory beside `path`, flushes it to the disk and gives it its name.

    The order is: files, directory, rename, parent directory, each synchronised before the next. When `write` fails
    nothing is left.

    Raises:
        FileExistsError: there is something under that name already.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    place = path.parent / f"{UNFINISHED}{path.name}-{os.getpid()}"
    delete_tree(place)
    try:
        make_directory(place)
        write(place)
        for file in sorted(place.iterdir()):
            with file.open("rb") as opened:
                faults.reach("directory.sync-file", file)
                os.fsync(opened.fileno())
        sync_folder(place)
        name_directory(place, path)
    except BaseException:
        with contextlib.suppress(OSError):
            delete_tree(place)
        raise


def make_directory(place: Path) -> None:
    """Makes a directory and its parents; one that another process has made is taken as it is."""
    faults.reach("directory.make", place)
    place.mkdir(parents=True, exist_ok=True)


def name_directory(place: Path, path: Path) -> None:
    """Gives a whole directory its name, for good."""
    faults.reach("directory.rename", path)
    place.rename(path)
    sync_folder(path.parent)


def retire_directory(path: Path) -> Path:
    """Takes a directory's name away, so that no reader meets half of it while it is deleted; returns where it is."""
    place = path.parent / f"{UNFINISHED}{path.name}{RETIRED}"
    delete_tree(place)
    faults.reach("directory.retire", path)
    path.rename(place)
    sync_folder(path.parent)
    return place


def delete_tree(place: Path, marker: str = "") -> None:
    """Deletes a directory that no reader knows, the marker first; a missing one is no error."""
    if not place.is_dir() or place.is_symlink():
        return
    for entry in sorted(place.iterdir(), key=lambda entry: (entry.name != marker, entry.name)):
        if entry.is_dir() and not entry.is_symlink():
            delete_tree(entry)
        else:
            faults.reach("directory.unlink", entry)
            entry.unlink(missing_ok=True)
    faults.reach("directory.remove", place)
    place.rmdir()


def move_aside(path: Path, folder: Path) -> Path:
    """Moves a file or directory into `folder` under a name that is free, and returns where it is now."""
    folder.mkdir(parents=True, exist_ok=True)
    name = path.name.removeprefix(UNFINISHED)
    number = 0
    while (target := folder / (f"{name}-{number}" if number else name)).exists():
        number += 1
    faults.reach("aside.rename", path)
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
