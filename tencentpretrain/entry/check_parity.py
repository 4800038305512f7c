"""Compares this package with recorded numbers of a reference: models, tokenizers, optimizers, data, curves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tencentpretrain.entry.run import run_main
from tencentpretrain.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per case with its largest deviation; the exit code is 1 if any case has not passed."""
    parser = argparse.ArgumentParser(prog="check_parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder of records, or one record (.json)")
    parser.add_argument(
        "--vocabularies",
        type=Path,
        help="folder of the vocabularies that records name (default: ../data/vocab from the folder `parity`)",
    )
    options = parser.parse_args(argv)
    return run_main(lambda: _check(options.folder, options.vocabularies))


def _check(folder: Path, vocabularies: Path | None) -> int:
    if not folder.exists():
        raise ConfigError(f"{folder} does not exist; give a folder of records")
    from tencentpretrain.parity.dispatch import check_folder

    passed = failed = 0
    for result in check_folder(folder, vocabularies or _beside(folder)):
        passed, failed = passed + result.passed, failed + (not result.passed)
        mark = "ok  " if result.passed else "MISS"
        print(f"{mark} {result.name:44} deviation {result.deviation:.3g}  {result.detail}".rstrip(), flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


def _beside(folder: Path) -> Path:
    """The vocabularies that lie beside a folder called `parity`."""
    resolved = folder.resolve()
    root = next((parent for parent in (resolved, *resolved.parents) if parent.name == "parity"), resolved)
    return root.parent / "data" / "vocab"
