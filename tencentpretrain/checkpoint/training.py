"""Checkpoints of a run: directories with a manifest, from which training continues exactly.

`checkpoints/step-00000500/` holds `model.safetensors`, `optim.safetensors`, `state.json` and, written last,
`MANIFEST.json` with the size and SHA-256 of each file. `checkpoints/latest` names the newest for people; programs go by
the numbers. No file in it runs code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tencentpretrain.checkpoint.atomic import UNFINISHED, move_aside, publish_directory, remove_directory
from tencentpretrain.checkpoint.files import read_tensors, write_tensors
from tencentpretrain.data.durable import storage_errors, to_json, write_durably
from tencentpretrain.errors import CheckpointMismatch, ResourceError

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "MANIFEST.json"
_FILES = ("model.safetensors", "optim.safetensors", "state.json")
_NAME = re.compile(r"step-(\d{8,})")
_PASSING_ERRORS = (errno.EIO, errno.ESTALE)
_RETRIES = 3


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that a run needs to continue.

    Fields:
        model: weights by published name.
        optimizer: the optimizer's tensors, as "<parameter>/<what>".
        values: plain JSON: step, data position, counters, configuration, fingerprints.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    values: Mapping[str, Any]


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        keep: how many of the newest stay; 0 keeps all.
        retry_seconds: first pause before writing again after a passing input/output error; it doubles.
    """

    def __init__(self, folder: Path, keep: int = 0, retry_seconds: float = 0.5) -> None:
        self.folder = folder
        self.keep = keep
        self.retry_seconds = retry_seconds

    def steps(self) -> list[int]:
        """Returns the steps of all published checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Returns the directory of a step."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: TrainingState) -> Path:
        """Publishes a checkpoint, points `latest` to it and deletes the oldest beyond `keep`.

        A checkpoint of that step that exists already is replaced.

        Raises:
            ResourceError: the disk is full or does not take the files; earlier checkpoints are as they were.
        """
        path = self.path(step)
        needed = byte_size(state.model) + byte_size(state.optimizer)
        require_space(self.folder, needed)

        def publish() -> None:
            if path.exists():
                remove_directory(path)
            publish_directory(path, lambda place: _write(place, step, state))
            write_durably(self.folder / "latest", f"{path.name}\n".encode())

        with storage_errors(path, needed):
            self._with_retries(publish, path)
            self._prune()
        return path

    def tidy(self) -> None:
        """Moves aside what a process left behind that ended while it saved; only the newest such rest is kept."""
        if not self.folder.is_dir():
            return
        aside = self.folder / "aside"
        for rest in sorted(self.folder.glob(f"{UNFINISHED}*")):
            for older in aside.glob("*") if aside.is_dir() else ():
                shutil.rmtree(older, ignore_errors=True)
            logger.info("moved an unfinished checkpoint to %s", move_aside(rest, aside))

    def newest(self) -> Path | None:
        """Returns the newest checkpoint that is whole, or None if there never was one.

        Damaged newer ones are moved to `damaged/`, which is logged with the reason.

        Raises:
            CheckpointMismatch: there are checkpoints, but every one is damaged; each is listed with its reason and none
                is moved.
        """
        damage: list[tuple[Path, str]] = []
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                verify(path)
            except CheckpointMismatch as error:
                damage.append((path, str(error)))
                continue
            for bad, reason in damage:
                moved = move_aside(bad, self.folder / "damaged")
                logger.warning("%s; moved to %s, continuing from %s", reason, moved, path.name)
            return path
        if damage:
            reasons = "\n".join(f"  {reason}" for _, reason in damage)
            raise CheckpointMismatch(
                f"{self.folder}: every checkpoint of this run is damaged; restore one, or start anew with --no-resume\n"
                f"{reasons}"
            )
        return None

    def _prune(self) -> None:
        """Deletes the oldest checkpoints beyond `keep`, in numeric order, never the newest."""
        if self.keep > 0:
            for step in self.steps()[: -self.keep]:
                remove_directory(self.path(step))

    def _with_retries(self, publish: Callable[[], None], path: Path) -> None:
        for attempt in range(_RETRIES + 1):
            try:
                publish()
                return
            except (OSError, ResourceError) as error:
                cause = error.__cause__ if isinstance(error, ResourceError) else error
                passing = isinstance(cause, OSError) and cause.errno in _PASSING_ERRORS
                if not passing or attempt == _RETRIES:
                    raise
                pause = self.retry_seconds * 2**attempt
                logger.warning("%s: %s; writing it again in %.1f seconds", path, cause, pause)
                time.sleep(pause)


def load(path: Path) -> TrainingState:
    """Opens a checkpoint that has been verified; tensors are read when they are asked for."""
    values = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if values.get("format") != FORMAT:
        raise CheckpointMismatch(
            f"{path}: written in format {values.get('format')!r}, this version continues format {FORMAT}"
        )
    return TrainingState(
        model=read_tensors(path / "model.safetensors"),
        optimizer=read_tensors(path / "optim.safetensors"),
        values=values,
    )


def verify(path: Path) -> None:
    """Reads every byte of a checkpoint and compares it with the manifest.

    Raises:
        CheckpointMismatch: a file is missing, foreign, of another size, or has other bytes; it is named.
    """
    manifest_path = path / MANIFEST
    try:
        manifest = json.loads(manifest_path.read_bytes())
        files, step = manifest["files"], manifest["step"]
        sealed = manifest.pop("seal") == _seal(manifest)
    except FileNotFoundError:
        raise CheckpointMismatch(f"{path}: {MANIFEST} is missing, so this checkpoint was not finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointMismatch(f"{manifest_path}: cannot be read ({error})") from None
    if not sealed:
        raise CheckpointMismatch(f"{manifest_path}: its content was changed")
    if path.name != f"step-{step:08d}":
        raise CheckpointMismatch(f"{path}: holds step {step}, not the one in its name")
    foreign = sorted({entry.name for entry in path.iterdir()} - {MANIFEST, *files})
    if foreign:
        raise CheckpointMismatch(f"{path / foreign[0]}: does not belong to this checkpoint")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointMismatch(f"{file}: is missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise CheckpointMismatch(f"{file}: expected {expected['size']} bytes, found {size}")
        if _sha256(file) != expected["sha256"]:
            raise CheckpointMismatch(f"{file}: its bytes were changed (SHA-256 differs from the manifest)")


def byte_size(tensors: Mapping[str, Tensor]) -> int:
    """Returns how many bytes the tensors take on disk, tied ones once."""
    sizes = {(tensor.data_ptr(), tensor.shape, tensor.device): tensor.nbytes for tensor in tensors.values()}
    return sum(sizes.values())


def require_space(path: Path, needed: int) -> None:
    """Raises ResourceError if the disk that holds `path` has not room for `needed` bytes and their headers."""
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    wanted = needed + needed // 50 + 65536
    if wanted > free:
        raise ResourceError(
            f"{path}: not enough space to save: {wanted:,} bytes are needed, {free:,} are free; nothing was written, "
            "earlier checkpoints are whole. Free some space and run the same command again"
        )


def _write(place: Path, step: int, state: TrainingState) -> None:
    write_tensors(place / "model.safetensors", state.model, "safetensors")
    write_tensors(place / "optim.safetensors", state.optimizer, "safetensors")
    write_durably(place / "state.json", to_json({**state.values, "format": FORMAT, "step": step}))
    files = {name: {"size": (place / name).stat().st_size, "sha256": _sha256(place / name)} for name in _FILES}
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "files": files}
    manifest["seal"] = _seal(manifest)
    write_durably(place / MANIFEST, to_json(manifest))


def _seal(manifest: Mapping[str, Any]) -> str:
    """The hash of a manifest's own content."""
    return hashlib.sha256(to_json(dict(manifest))).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
