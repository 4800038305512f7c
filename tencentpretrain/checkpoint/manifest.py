"""The marker of a whole checkpoint: size and SHA-256 of each of its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tencentpretrain.data.durable import DurableFile, to_json
from tencentpretrain.errors import CheckpointMismatch

MANIFEST = "MANIFEST.json"
_BLOCK = 1 << 20
_WORTH_THREADS = 1 << 23


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, file: DurableFile) -> FileFacts:
        """Returns the facts of what was given to a file."""
        return cls(file.size, file.sha256)


def write_manifest(place: Path, format: int, step: int, files: Mapping[str, FileFacts]) -> None:
    """Writes the marker; everything else must be on the disk."""
    manifest: dict[str, Any] = {
        "format": format,
        "step": step,
        "files": {name: asdict(facts) for name, facts in files.items()},
    }
    manifest["seal"] = _seal(manifest)
    with DurableFile(place / MANIFEST) as file:
        file.write(to_json(manifest))


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint, with its files as FileFacts by name.

    Raises:
        CheckpointMismatch: it is missing or damaged.
    """
    place = path / MANIFEST
    try:
        content = place.read_bytes()
        manifest: dict[str, Any] = json.loads(content)
        sealed = content == to_json(manifest) and manifest.pop("seal") == _seal(manifest)
        manifest["step"] = int(manifest["step"])
        manifest["files"] = {str(name): FileFacts(**facts) for name, facts in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointMismatch(f"{path}: {MANIFEST} is missing, so this checkpoint was not finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        size = f", {place.stat().st_size} bytes" if place.is_file() else ""
        raise CheckpointMismatch(f"{place}: cannot be read ({error}{size})") from None
    if not sealed:
        raise CheckpointMismatch(f"{place}: its content was changed")
    return manifest


def verify(path: Path) -> None:
    """Reads every byte of a checkpoint and compares it with the manifest.

    Raises:
        CheckpointMismatch: a file is missing, foreign, of another size, or has other bytes; it is named.
    """
    manifest = read_manifest(path)
    files: dict[str, FileFacts] = manifest["files"]
    if path.name != f"step-{manifest['step']:08d}":
        raise CheckpointMismatch(f"{path}: holds step {manifest['step']}, not the one in its name")
    foreign = sorted({entry.name for entry in path.iterdir()} - {MANIFEST, *files})
    if foreign:
        raise CheckpointMismatch(f"{path / foreign[0]}: does not belong to this checkpoint")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointMismatch(f"{file}: is missing")
        size = file.stat().st_size
        if size != expected.size:
            raise CheckpointMismatch(f"{file}: expected {expected.size} bytes, found {size}")
    with contextlib.ExitStack() as stack:
        paths = [path / name for name in files]
        if sum(facts.size for facts in files.values()) < _WORTH_THREADS:
            found: Iterable[str] = map(sha256, paths)
        else:
            found = stack.enter_context(ThreadPoolExecutor(max_workers=min(8, len(files)))).map(sha256, paths)
        for file, expected, digest in zip(paths, files.values(), found, strict=True):
            if digest != expected.sha256:
                raise CheckpointMismatch(f"{file}: its bytes were changed (SHA-256 differs from the manifest)")


def sha256(file: Path) -> str:
    """Returns the digest of a file.

    Raises:
        CheckpointMismatch: it cannot be read.
    """
    digest, block = hashlib.sha256(), bytearray(_BLOCK)
    view = memoryview(block)
    try:
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(block):
                digest.update(view[:count])
    except OSError as error:
        raise CheckpointMismatch(f"{file}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    """The hash of a manifest's own content."""
    return hashlib.sha256(to_json(dict(manifest))).hexdigest()
