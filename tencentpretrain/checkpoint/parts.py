"""What each process adds to a checkpoint, and how the first one hears that it is there: by files, never by messages.

Process 1 of 4 writes `model-00001.safetensors`, `optim-00001.safetensors` and then `.part-00001.json`, which holds
their sizes and digests, or the sentence of an error. So no process waits inside a collective operation for another's
disk.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tencentpretrain import faults
from tencentpretrain.checkpoint.encoding import put_tensors, stored_size
from tencentpretrain.checkpoint.files import TensorFile, read_tensors
from tencentpretrain.checkpoint.manifest import FileFacts
from tencentpretrain.data.durable import DurableFile, to_json, write_durably
from tencentpretrain.errors import CheckpointMismatch, PeerError, ResourceError

KINDS = ("model", "optim")
_STOPPED = ".stopped.json"
_POLL_SECONDS = (0.005, 0.25)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The share of one process.

    Fields:
        rank: of the process.
        names: of its tensors, by kind, in their order.
        tensor_bytes: of its tensors, by kind.
        files: by name.
    """

    rank: int
    names: Mapping[str, Sequence[str]]
    tensor_bytes: Mapping[str, int]
    files: Mapping[str, FileFacts]


def file_name(kind: str, rank: int) -> str:
    """Returns the name of a process's file."""
    return f"{kind}-{rank:05d}.safetensors"


def part_size(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Returns how many bytes the files of a part take, exactly."""
    return sum(stored_size(part) for part in tensors.values())


def write_part(place: Path, rank: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> Part:
    """Writes the tensors of this process, by kind."""
    files = {}
    for kind, part in tensors.items():
        name = file_name(kind, rank)
        with DurableFile(place / name) as file:
            put_tensors(file, part, "safetensors")
        files[name] = FileFacts.of(file)
    return Part(
        rank=rank,
        names={kind: list(part) for kind, part in tensors.items()},
        tensor_bytes={kind: sum(tensor.nbytes for tensor in part.values()) for kind, part in tensors.items()},
        files=files,
    )


def announce(place: Path, part: Part) -> None:
    """Tells the other processes that a part is on the disk."""
    write_durably(_note(place, part.rank), to_json(asdict(part)))


def withdraw(place: Path, rank: int, sentence: str) -> None:
    """Removes this process's files and tells the others why, as far as the disk lets it."""
    for kind in KINDS:
        with contextlib.suppress(OSError):
            faults.reach("part.discard", place / file_name(kind, rank))
            (place / file_name(kind, rank)).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        name = _note(place, rank) if rank else place / _STOPPED
        write_durably(name, to_json({"rank": rank, "error": sentence}))


def wait_for_parts(place: Path, own: Part, world_size: int, expired: Callable[[], bool]) -> list[Part]:
    """Returns the parts of all processes as soon as they are there.

    Args:
        own: the part of this process.
        expired: whether the time is up.

    Raises:
        ResourceError: a process could not write its part.
        PeerError: a process did not write its part in time.
    """
    parts = {own.rank: own}
    for _ in _polls():
        for rank in range(world_size):
            if rank not in parts and (note := _read(_note(place, rank))) is not None:
                if "error" in note:
                    raise ResourceError(f"rank {rank} could not write its part of the checkpoint: {note['error']}")
                files = {name: FileFacts(**facts) for name, facts in note.pop("files").items()}
                parts[rank] = Part(**note, files=files)
        missing = [str(rank) for rank in range(world_size) if rank not in parts]
        if not missing:
            break
        if expired():
            raise PeerError(
                f"{place.name}: no part of the checkpoint from rank {', '.join(missing)} in time; look at what that "
                "process says. The checkpoint was not published, earlier ones are whole"
            )
    return [parts[rank] for rank in sorted(parts)]


def wait_for_publication(place: Path, expired: Callable[[], bool]) -> None:
    """Returns when the first process has given the directory its name.

    Raises:
        PeerError: it gave up, or took too long.
    """
    for _ in _polls():
        if (note := _read(place / _STOPPED)) is not None:
            raise PeerError(f"rank 0 did not publish the checkpoint: {note['error']}")
        if not place.exists():
            return
        if expired():
            raise PeerError(f"{place.name}: rank 0 did not publish the checkpoint in time; look at what it says")


def clear_notes(place: Path, world_size: int) -> None:
    """Removes the notes, which are no part of the checkpoint."""
    for rank in range(world_size):
        faults.reach("part.unlink", _note(place, rank))
        _note(place, rank).unlink(missing_ok=True)


def join(where: Path, files: Iterable[Path], kind: str) -> TensorFile:
    """Opens the files of all processes as one; a tensor is read when it is asked for.

    Raises:
        CheckpointMismatch: a tensor is in two of them.
    """
    entries: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for file in files:
        for name, entry in read_tensors(file).entries.items():
            if name in entries:
                raise CheckpointMismatch(f"{where}: {name!r} is in two parts, {owner[name]} and {file.name}")
            entries[name], owner[name] = entry, file.name
    return TensorFile(path=where, entries=entries, metadata={"kind": kind})


def require_whole(where: Path, parts: Sequence[Part], expected: Iterable[str]) -> None:
    """Refuses parts that have a weight twice, or lack one of `expected`.

    Raises:
        CheckpointMismatch: the weights are named.
    """
    for kind in KINDS:
        owner: dict[str, int] = {}
        for part in parts:
            for name in part.names[kind]:
                if name in owner:
                    raise CheckpointMismatch(f"{where}: {name!r} was given by rank {owner[name]} and rank {part.rank}")
                owner[name] = part.rank
        missing = [name for name in expected if name not in owner] if kind == "model" else []
        if missing:
            raise CheckpointMismatch(f"{where}: no process gave {len(missing)} weights, first {missing[0]!r}")


def published_tensors(
    place: Path, own: Mapping[str, Tensor], parts: Sequence[Part], order: Sequence[str], chosen: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Returns the weights to publish: this process's from memory, the others' mapped from their files.

    Args:
        own: this process's weights.
        order: names in the order of the model; what is not among them comes after, rank by rank.
        chosen: which of the weights are published.
    """
    others = join(place, (place / file_name("model", part.rank) for part in parts[1:]), "model")
    given = [name for part in parts for name in part.names["model"]]
    places = {name: number for number, name in enumerate(order)}
    given.sort(key=lambda name: places.get(name, len(places)))  # stable: the rest stays rank by rank
    tensors: dict[str, Tensor] = {}
    read: dict[int, Tensor] = {}  # by entry, so that one tensor under two names stays one
    for name in filter(chosen, given):
        if name in own:
            tensors[name] = own[name]
            continue
        entry = others.entries[name]
        if id(entry) not in read:
            read[id(entry)] = entry.load()
        tensors[name] = read[id(entry)]
    return tensors


def _note(place: Path, rank: int) -> Path:
    return place / f".part-{rank:05d}.json"


def _read(note: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(note.read_bytes())
        return found
    except (FileNotFoundError, NotADirectoryError):
        return None


def _polls() -> Iterator[None]:
    pause, longest = _POLL_SECONDS
    while True:
        yield
        time.sleep(pause)
        pause = min(pause * 1.5, longest)
