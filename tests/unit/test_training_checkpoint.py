"""Checkpoints of a run: damage is found and named, the newest whole one is used, none is lost."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tencentpretrain import faults
from tencentpretrain.checkpoint.background import BackgroundWriter
from tencentpretrain.checkpoint.files import write_tensors
from tencentpretrain.checkpoint.manifest import read_manifest, write_manifest
from tencentpretrain.checkpoint.training import CheckpointFolder, Publication, TrainingState, load, verify
from tencentpretrain.data.durable import to_json
from tencentpretrain.errors import CheckpointMismatch, PeerError, ResourceError

FILES = ("model-00000.safetensors", "optim-00000.safetensors", "state.json", "MANIFEST.json")


def _state(seed: int) -> TrainingState:
    generator = torch.Generator().manual_seed(seed)
    weights = {"a.weight": torch.randn(5, 3, generator=generator), "b.bias": torch.randn(4, generator=generator)}
    weights["tied.weight"] = weights["a.weight"]
    moments = {f"{name}/exp_avg": torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    return TrainingState(model=weights, optimizer=moments, values={"position": seed * 8, "share": 0.1})


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", retry_seconds=0)
    for step in (20, 40):
        checkpoints.save(step, _state(step))
    return checkpoints


def test_what_was_saved_is_loaded(folder: CheckpointFolder) -> None:
    path = folder.newest()
    assert path == folder.path(40)
    loaded, saved = load(path), _state(40)
    assert set(loaded.model) == set(saved.model)
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in saved.model.items())
    assert all(torch.equal(loaded.optimizer[name], tensor) for name, tensor in saved.optimizer.items())
    assert loaded.values["position"] == 320
    assert loaded.values["step"] == 40
    assert (folder.folder / "latest").read_text() == "step-00000040\n"


@pytest.mark.parametrize("name", FILES)
def test_truncation_is_found_and_the_older_one_used(folder: CheckpointFolder, name: str) -> None:
    path = folder.path(40)
    whole = (path / name).read_bytes()
    draw = random.Random(name)
    for length in [0, *draw.sample(range(1, len(whole)), 20)]:
        (path / name).write_bytes(whole[:length])
        with pytest.raises(CheckpointMismatch, match=name):
            verify(path)
        if name != "MANIFEST.json":
            with pytest.raises(CheckpointMismatch, match=f"expected {len(whole)} bytes, found {length}"):
                verify(path)
    assert folder.newest() == folder.path(20)
    assert (folder.folder / "damaged" / path.name / name).exists()
    assert not path.exists()


def test_every_flipped_bit_is_found(folder: CheckpointFolder) -> None:
    path = folder.path(40)
    draw = random.Random(0)
    for flip in range(400):
        file = path / FILES[flip % len(FILES)]
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        whole = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(CheckpointMismatch, match=file.name):
            verify(path)
        file.write_bytes(whole)
    verify(path)


@pytest.mark.parametrize("name", FILES)
def test_missing_swapped_and_foreign_files_are_named(folder: CheckpointFolder, name: str) -> None:
    path = folder.path(40)
    whole = (path / name).read_bytes()
    (path / name).unlink()
    with pytest.raises(CheckpointMismatch, match=f"{name}.*is missing"):
        verify(path)
    shutil.copy(folder.path(20) / name, path / name)
    with pytest.raises(CheckpointMismatch):
        verify(path)
    (path / name).write_bytes(whole)
    (path / f"{name}.old").write_bytes(whole)
    with pytest.raises(CheckpointMismatch, match=rf"{name}\.old.*does not belong"):
        verify(path)


def test_a_whole_checkpoint_under_another_name_is_refused(folder: CheckpointFolder) -> None:
    shutil.copytree(folder.path(20), folder.path(60))
    with pytest.raises(CheckpointMismatch, match="holds step 20"):
        verify(folder.path(60))


def test_all_damaged_is_refused_with_every_reason_and_nothing_moves(folder: CheckpointFolder) -> None:
    (folder.path(20) / "state.json").write_text("{}")
    (folder.path(40) / "MANIFEST.json").unlink()
    for _ in range(2):  # a second start must not take the run for a new one
        with pytest.raises(CheckpointMismatch) as caught:
            folder.newest()
        assert "step-00000020" in str(caught.value)
        assert "step-00000040" in str(caught.value)
        assert "state.json" in str(caught.value)
        assert caught.value.exit_code == 4
    assert folder.steps() == [20, 40]


def test_leftovers_are_moved_aside_and_never_hinder(folder: CheckpointFolder) -> None:
    for name in (".unfinished-step-00000060-3", ".unfinished-step-00000060-1"):
        (folder.folder / name).mkdir()
        (folder.folder / name / "model-00000.safetensors").write_bytes(b"half")
    folder.tidy()
    assert folder.save(60, _state(60)) == folder.newest()
    assert len(list((folder.folder / "aside").iterdir())) == 1
    assert not list(folder.folder.glob(".unfinished-*"))


def test_a_full_disk_leaves_earlier_checkpoints(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=1, used=1, free=1000)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ResourceError, match="1,000 are free"):
            folder.save(60, _state(60))
    assert folder.newest() == folder.path(40)
    assert not list(folder.folder.glob(".unfinished-*"))


@pytest.fixture
def fault() -> Iterator[None]:
    yield
    faults.arm(None)
    faults.trace(None)


@pytest.mark.usefixtures("fault")
def test_passing_errors_are_retried(folder: CheckpointFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    faults.trace(tmp_path / "points")
    folder.save(50, _state(50))
    counts = Counter((tmp_path / "points").read_text().split("\n"))
    points = [line.split("\t")[0] for line in counts if line]
    assert len(set(points)) >= 7
    for step, point in enumerate(sorted(set(points)), start=60):
        faults.arm(f"{point}:1:EIO")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            verify(folder.save(step, _state(step)))
        assert any("again" in record.message for record in caplog.records), point
        assert folder.newest() == folder.path(step)


@pytest.mark.usefixtures("fault")
def test_persistent_errors_end_after_three_retries(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def refuse(name: str, path: object = None) -> None:
        if name == "file.sync":
            attempts.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(faults, "reach", refuse)
    with pytest.raises(ResourceError, match="cannot be written"):
        folder.save(60, _state(60))
    assert len(attempts) == 4
    assert folder.newest() == folder.path(40)
    assert not list(folder.folder.glob(".unfinished-*"))


def test_the_first_format_loads(tmp_path: Path) -> None:
    """As the first released version wrote it."""
    saved, path = _state(7), tmp_path / "step-00000007"
    path.mkdir()
    write_tensors(path / "model.safetensors", saved.model, "safetensors")
    write_tensors(path / "optim.safetensors", saved.optimizer, "safetensors")
    (path / "state.json").write_bytes(to_json({**saved.values, "format": 1, "step": 7}))
    files = {
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in sorted(path.iterdir())
    }
    manifest = {"format": 1, "step": 7, "files": files}
    seal = hashlib.sha256(to_json(manifest)).hexdigest()
    (path / "MANIFEST.json").write_bytes(to_json({**manifest, "seal": seal}))
    folder = CheckpointFolder(tmp_path)
    assert folder.newest() == path
    loaded = load(path)
    assert {name: tensor.tolist() for name, tensor in loaded.model.items()} == {
        name: tensor.tolist() for name, tensor in saved.model.items()
    }
    assert set(loaded.optimizer) == set(saved.optimizer)
    assert loaded.values["position"] == 56


def _share(state: TrainingState, rank: int, world_size: int) -> TrainingState:
    """Each process's tensors; tied ones stay together."""
    owner = {"a.weight": 0, "tied.weight": 0, "b.bias": 1 % world_size}

    def pick(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if owner[name.split("/")[0]] == rank}

    return TrainingState(model=pick(state.model), optimizer=pick(state.optimizer), values=state.values)


def _save_together(
    folders: list[CheckpointFolder], step: int, shares: list[TrainingState], publication: Publication
) -> list[BaseException | None]:
    """Lets every process save, the first one last."""
    errors: list[BaseException | None] = [None] * len(folders)

    def save(rank: int) -> None:
        try:
            folders[rank].save(step, shares[rank], publication if rank == 0 else None)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=save, args=(rank,)) for rank in reversed(range(len(folders)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def _folders(place: Path, world_size: int, **settings: Any) -> list[CheckpointFolder]:
    return [
        CheckpointFolder(place, 2, retry_seconds=0, rank=rank, world_size=world_size, **settings)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_save_one_checkpoint(tmp_path: Path, world_size: int) -> None:
    folders = _folders(tmp_path / "checkpoints", world_size)
    for step in (10, 20, 30):
        state = _state(step)
        shares = [_share(state, rank, world_size) for rank in range(world_size)]
        weights = [tmp_path / f"model-{step}", tmp_path / f"model-{step + 1}"]
        publication = Publication(paths=weights, order=list(state.model))
        assert _save_together(folders, step, shares, publication) == [None] * world_size
    path = folders[0].newest()
    assert path == folders[-1].path(30)
    assert folders[0].steps() == [20, 30]
    assert not list(path.glob(".*"))
    assert len(list(path.glob("*.safetensors"))) == 2 * world_size
    loaded = load(path)
    for ours, saved in ((loaded.model, state.model), (loaded.optimizer, state.optimizer)):
        assert set(ours) == set(saved)
        assert all(torch.equal(ours[name], tensor) for name, tensor in saved.items())
    alone = tmp_path / "alone"
    write_tensors(alone, state.model)
    assert [file.read_bytes() for file in weights] == [alone.read_bytes()] * 2


def test_parts_that_overlap_or_lack_a_weight_are_refused(tmp_path: Path) -> None:
    state = _state(1)
    whole, half = _share(state, 0, 1), _share(state, 0, 2)
    everything = Publication(order=list(state.model))
    errors = _save_together(_folders(tmp_path / "one", 2), 5, [whole, whole], everything)
    assert "given by rank 0 and rank 1" in str(errors[0])
    assert isinstance(errors[1], PeerError)
    errors = _save_together(
        _folders(tmp_path / "two", 2), 5, [half, half.__class__(model={}, optimizer={}, values={})], everything
    )
    assert "no process gave 1 weights, first 'b.bias'" in str(errors[0])
    assert CheckpointFolder(tmp_path / "two").steps() == []


def test_a_missing_process_is_named_in_time(tmp_path: Path) -> None:
    folders = _folders(tmp_path, 3, patience=0.05)
    with pytest.raises(PeerError, match=r"from rank 1, 2 in time"):
        folders[0].save(5, _state(1))
    with pytest.raises(PeerError, match="rank 0 did not publish"):
        folders[1].save(5, _state(1))
    folders[0].tidy()
    assert folders[0].newest() is None


@pytest.mark.usefixtures("fault")
def test_the_failure_of_one_process_is_heard_by_all(tmp_path: Path) -> None:
    folders = _folders(tmp_path / "checkpoints", 2, patience=20.0)
    state = _state(1)
    shares = [_share(state, rank, 2) for rank in range(2)]
    assert _save_together(folders, 5, shares, Publication()) == [None, None]
    faults.arm("file.write/model-00001.safetensors:1:ENOSPC")
    errors = _save_together(folders, 10, shares, Publication())
    assert isinstance(errors[1], ResourceError)
    assert isinstance(errors[0], ResourceError)
    assert "rank 1 could not write its part" in str(errors[0])
    assert "disk is full" in str(errors[0])
    assert folders[0].newest() == folders[0].path(5)
    folders[0].tidy()
    assert _save_together(folders, 10, shares, Publication()) == [None, None]


def test_a_process_without_a_part_is_missed_on_loading(tmp_path: Path) -> None:
    folders = _folders(tmp_path, 2)
    state = _state(1)
    assert _save_together(folders, 5, [_share(state, rank, 2) for rank in range(2)], Publication()) == [None, None]
    path = folders[0].path(5)
    files = {name: facts for name, facts in read_manifest(path)["files"].items() if name != "model-00001.safetensors"}
    write_manifest(path, 2, 5, files)
    with pytest.raises(CheckpointMismatch, match=r"model-00001\.safetensors.*does not belong"):
        verify(path)
    (path / "model-00001.safetensors").unlink()
    verify(path)
    with pytest.raises(CheckpointMismatch, match=r"model-00001\.safetensors: is missing"):
        load(path)


def test_a_crash_while_a_checkpoint_is_replaced_loses_nothing(folder: CheckpointFolder) -> None:
    (folder.folder / "step-00000040").rename(folder.folder / ".unfinished-step-00000040-retired")
    (folder.folder / "step-00000020").rename(folder.folder / ".unfinished-step-00000020-retired")
    (folder.folder / ".unfinished-step-00000020-retired" / "MANIFEST.json").unlink()
    folder.tidy()
    assert folder.newest() == folder.path(40)
    assert folder.steps() == [40]


def test_the_writer_runs_one_job_after_the_other_and_tells_of_failures() -> None:
    writer, seen = BackgroundWriter(), []
    gate = threading.Event()

    def first() -> None:
        gate.wait(5)
        seen.append(1)

    writer.submit(first)
    writer.check()
    assert not seen
    gate.set()
    writer.submit(lambda: seen.append(2))
    writer.finish()
    assert seen == [1, 2]

    def fail() -> None:
        raise ResourceError("the disk is full")

    writer.submit(fail)

    def check_for_a_while() -> None:
        for _ in range(5000):
            writer.check()
            time.sleep(0.001)

    with pytest.raises(ResourceError, match="disk is full"):
        check_for_a_while()
    writer.finish()  # told once
