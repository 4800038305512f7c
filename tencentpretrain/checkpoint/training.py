"""Checkpoints of a run: directories with a manifest, from which training continues exactly.

`checkpoints/step-00000500/` holds `model-<rank>.safetensors` and `optim-<rank>.safetensors` of each process that saved
it, `state.json` and, written last, `MANIFEST.json` with the size and SHA-256 of each file. Their union is the same
whatever the number of processes. Format 1, of one process, had `model.safetensors` and `optim.safetensors`.
`checkpoints/latest` names the newest for people; programs go by the numbers. No file in it runs code.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tencentpretrain.checkpoint import parts
from tencentpretrain.checkpoint.atomic import (
    RETIRED,
    UNFINISHED,
    delete_tree,
    make_directory,
    move_aside,
    name_directory,
    retire_directory,
)
from tencentpretrain.checkpoint.encoding import Format, stored_size
from tencentpretrain.checkpoint.files import write_tensors
from tencentpretrain.checkpoint.manifest import MANIFEST, FileFacts, read_manifest, verify, write_manifest
from tencentpretrain.data.durable import DurableFile, free_bytes, storage_errors, sync_folder, to_json, write_durably
from tencentpretrain.errors import CheckpointMismatch, ResourceError

__all__ = ["CheckpointFolder", "Publication", "TrainingState", "load", "require_space", "verify"]

logger = logging.getLogger(__name__)

FORMAT = 2
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_PASSING_ERRORS = (errno.EIO, errno.ESTALE)
_RETRIES = 3
_PATIENCE_SECONDS = 1800.0
_MANIFEST_ENTRY = 160

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that a run needs to continue; of several processes, each holds a share of the tensors.

    Fields:
        model: weights by published name.
        optimizer: the optimizer's tensors, as "<parameter>/<what>".
        values: plain JSON: step, data position, counters, configuration, fingerprints.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Weights that appear together with a checkpoint, in files of their own.

    Fields:
        paths: where; all hold the same.
        form: of the files.
        order: names of the model's weights in their order, as far as this process knows them.
        chosen: which of them are published.
    """

    paths: Sequence[Path] = ()
    form: Format = "bin"
    order: Sequence[str] = ()
    chosen: Callable[[str], bool] = lambda name: True


class CheckpointFolder:
    """The checkpoints of one run.

    All processes of a run save together. The first one tidies before any of them saves, chooses the checkpoint to
    continue from, and publishes; the others only add their parts.

    Args:
        folder: where they are.
        keep: how many of the newest stay; 0 keeps all.
        retry_seconds: first pause before writing again after a passing input/output error; it doubles.
        rank, world_size: of this process among all.
        patience: seconds that a process waits for the files of others.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 0,
        retry_seconds: float = 0.5,
        *,
        rank: int = 0,
        world_size: int = 1,
        patience: float = _PATIENCE_SECONDS,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.retry_seconds = retry_seconds
        self.rank = rank
        self.world_size = world_size
        self.patience = patience
        self._saves = 0
        self._published: int | None = None
        self._hurry: float | None = None

    def steps(self) -> list[int]:
        """Returns the steps of all published checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Returns the directory of a step."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: TrainingState, publication: Publication | None = None) -> Path:
        """Publishes weights and a checkpoint, points `latest` to it and deletes the oldest beyond `keep`.

        A checkpoint of that step that exists already is replaced. Called by all processes, with their shares; each
        returns when the checkpoint is published.

        Raises:
            ResourceError: the disk is full or does not take the files; earlier checkpoints are as they were.
            PeerError: another process did not do its share in time.
        """
        publication = publication or Publication()
        path = self.path(step)
        if step == self._published and not publication.paths:
            return path  # a stop right after a save
        self._saves += 1
        place = self.folder / f"{UNFINISHED}{path.name}-{self._saves}"  # the same on all processes
        needed = self.predicted_size(state, publication)
        require_space(self.folder, needed)
        shares = {"model": state.model, "optim": state.optimizer}
        try:
            with storage_errors(path, needed):
                self._retried(lambda: self._begin(place), path)
                part = self._retried(lambda: parts.write_part(place, self.rank, shares), path)
                if self.rank:
                    self._retried(lambda: parts.announce(place, part), path)
                    parts.wait_for_publication(place, self._deadline())
                else:
                    self._publish(place, path, step, state, part, publication)
        except BaseException as error:
            self._withdraw(place, error)
            raise
        self._published = step
        return path

    def predicted_size(self, state: TrainingState, publication: Publication) -> int:
        """Returns how many bytes a save is going to write; of several processes, if their shares are alike."""
        own = parts.part_size({"model": state.model, "optim": state.optimizer})
        weights = {name: tensor for name, tensor in state.model.items() if publication.chosen(name)}
        own += len(publication.paths) * stored_size(weights, publication.form)
        frame = len(to_json(dict(state.values))) + _MANIFEST_ENTRY * (2 * self.world_size + 2)
        return own * self.world_size + frame

    def tidy(self) -> None:
        """Moves aside what processes left behind that ended while they saved; only the newest such rest is kept.

        Only the first process does so, and before the others save.
        """
        if self.rank or not self.folder.is_dir():
            return
        aside = self.folder / "aside"
        with storage_errors(self.folder, 0):
            for rest in sorted(self.folder.glob(f"{UNFINISHED}*{RETIRED}")):
                path = self.folder / rest.name.removeprefix(UNFINISHED).removesuffix(RETIRED)
                if (rest / MANIFEST).is_file() and not path.exists():
                    name_directory(rest, path)  # still whole: it was about to be replaced or deleted
            for rest in sorted(self.folder.glob(f"{UNFINISHED}*")):
                for older in aside.glob("*") if aside.is_dir() else ():
                    delete_tree(older)
                logger.info("moved an unfinished checkpoint to %s", move_aside(rest, aside))

    def newest(self) -> Path | None:
        """Returns the newest checkpoint that is whole, or None if there never was one. For the first process.

        Damaged newer ones are moved to `damaged/`, which is logged with the reason. The other processes are told the
        step and take `path(step)`.

        Raises:
            CheckpointMismatch: there are checkpoints, but every one is damaged; each is listed with its reason and none
                is moved.
        """
        assert self.rank == 0, "the first process chooses"
        damage: list[tuple[Path, str]] = []
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                verify(path)
            except CheckpointMismatch as error:
                damage.append((path, str(error)))
                continue
            for bad, reason in damage:
                with storage_errors(bad, 0):
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

    def hurry(self, seconds: float) -> None:
        """Shortens the waiting for other processes, because one of them has failed."""
        self._hurry = time.monotonic() + seconds

    def _begin(self, place: Path) -> None:
        if self.world_size == 1 and place.exists():
            move_aside(place, self.folder / "aside")
        make_directory(place)

    def _publish(
        self,
        place: Path,
        path: Path,
        step: int,
        state: TrainingState,
        own: parts.Part,
        publication: Publication,
    ) -> None:
        everyone = parts.wait_for_parts(place, own, self.world_size, self._deadline())
        parts.require_whole(path, everyone, publication.order)
        if publication.paths:
            weights = parts.published_tensors(place, state.model, everyone, publication.order, publication.chosen)
            require_space(path, len(publication.paths) * stored_size(weights, publication.form))
            for target in publication.paths:
                self._retried(lambda target=target: write_tensors(target, weights, publication.form), target)  # type: ignore[misc]
            del weights
        values = {**state.values, "format": FORMAT, "step": step, "parts": self.world_size}
        self._retried(lambda: self._seal(place, step, everyone, values), path)
        self._retried(lambda: self._name(place, path), path)
        self._retried(lambda: write_durably(self.folder / "latest", f"{path.name}\n".encode()), path)
        self._retried(lambda: self._prune(step), path)

    def _seal(self, place: Path, step: int, everyone: Sequence[parts.Part], values: Mapping[str, Any]) -> None:
        files = {name: facts for part in everyone for name, facts in part.files.items()}
        parts.clear_notes(place, self.world_size)
        with DurableFile(place / _STATE) as file:
            file.write(to_json(dict(values)))
        files[_STATE] = FileFacts.of(file)
        sync_folder(place)
        write_manifest(place, FORMAT, step, files)
        sync_folder(place)

    def _name(self, place: Path, path: Path) -> None:
        """Gives the checkpoint its name; what had it before can be brought back until then."""
        if not place.exists():  # an earlier attempt came so far
            sync_folder(self.folder)
            return
        if path.exists():
            retire_directory(path)
        name_directory(place, path)

    def _prune(self, newest: int) -> None:
        """Deletes the oldest checkpoints beyond `keep`, in numeric order, never the one just published."""
        for rest in self.folder.glob(f"{UNFINISHED}*{RETIRED}"):
            delete_tree(rest, MANIFEST)
        if self.keep > 0:
            for step in self.steps()[: -self.keep]:
                if step != newest:
                    delete_tree(retire_directory(self.path(step)), MANIFEST)

    def _withdraw(self, place: Path, error: BaseException) -> None:
        """Frees the space of what was not published; with other processes there, they are told."""
        with contextlib.suppress(OSError):
            if self.world_size > 1 and place.is_dir():
                parts.withdraw(place, self.rank, str(error) or type(error).__name__)
            else:
                delete_tree(place)

    def _deadline(self) -> Callable[[], bool]:
        end = time.monotonic() + self.patience

        def expired() -> bool:
            return time.monotonic() > (end if self._hurry is None else min(end, self._hurry))

        return expired

    def _retried(self, action: Callable[[], Result], path: Path) -> Result:
        for attempt in range(_RETRIES + 1):
            try:
                return action()
            except (OSError, ResourceError) as error:
                cause = error.__cause__ if isinstance(error, ResourceError) else error
                passing = isinstance(cause, OSError) and cause.errno in _PASSING_ERRORS
                if not passing or attempt == _RETRIES:
                    raise
                pause = self.retry_seconds * 2**attempt
                logger.warning("%s: %s; writing it again in %.1f seconds", path, cause, pause)
                time.sleep(pause)
        raise AssertionError("every attempt returns or raises")


def load(path: Path) -> TrainingState:
    """Opens a checkpoint that has been verified, whole whatever the number of processes that saved it.

    Tensors are read when they are asked for.

    Raises:
        CheckpointMismatch: it is of another format, lacks the part of a process, or has a tensor twice.
    """
    values = json.loads((path / _STATE).read_text(encoding="utf-8"))
    files = read_manifest(path)["files"]
    if values.get("format") == 1:
        names = {kind: [f"{kind}.safetensors"] for kind in parts.KINDS}
    elif values.get("format") == FORMAT:
        names = {kind: [parts.file_name(kind, rank) for rank in range(values["parts"])] for kind in parts.KINDS}
    else:
        raise CheckpointMismatch(
            f"{path}: written in format {values.get('format')!r}, this version continues formats 1 and {FORMAT}"
        )
    missing = [name for kind in names.values() for name in kind if name not in files]
    if missing:
        raise CheckpointMismatch(f"{path / missing[0]}: is missing; it held the part of a process")
    model, optimizer = (parts.join(path, (path / name for name in names[kind]), kind) for kind in parts.KINDS)
    return TrainingState(model=model, optimizer=optimizer, values=values)


def require_space(path: Path, needed: int) -> None:
    """Raises ResourceError if the disk that holds `path` has not room for `needed` bytes."""
    free, wanted = free_bytes(path), needed + needed // 50 + 65536
    if wanted > free:
        raise ResourceError(
            f"{path}: not enough space to save: {wanted:,} bytes are needed, {free:,} are free; nothing was written, "
            "earlier checkpoints are whole. Free some space and run the same command again"
        )
