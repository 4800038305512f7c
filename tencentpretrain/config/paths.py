"""Finds shipped files from any working directory."""

from __future__ import annotations

import sys
from pathlib import Path


def find_file(path: str | Path) -> Path:
    """Returns where a file given on a command line is.

    A relative path is tried from the working directory, then from the repository root, then from the files installed
    with the package. The path itself comes back if nothing is found, so that the message names what was given.
    """
    path = Path(path)
    if path.is_absolute() or path.exists():
        return path
    home = Path(__file__).resolve().parents[2]
    installed = Path("share") / "tencentpretrain"
    for root in (home, Path(sys.prefix) / installed, home / installed):
        if (root / path).exists():
            return root / path
    return path
