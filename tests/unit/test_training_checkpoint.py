"""Checkpoints of a run: damage is found and named, the newest whole one is used, none is lost."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tencentpretrain.checkpoint import training
from tencentpretrain.checkpoint.training import CheckpointFolder, TrainingState, load, verify
from tencentpretrain.errors import CheckpointMismatch, ResourceError

FILES = ("model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json")


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
    for flip in range(2000):
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
    for name in (f".unfinished-step-00000060-{os.getpid()}", ".unfinished-step-00000060-1"):
        (folder.folder / name).mkdir()
        (folder.folder / name / "model.safetensors").write_bytes(b"half")
    folder.tidy()
    assert folder.save(60, _state(60)) == folder.newest()
    assert len(list((folder.folder / "aside").iterdir())) == 1
    assert not list(folder.folder.glob(".unfinished-*"))


def test_retention_over_random_histories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_write", lambda place, step, state: (place / "state.json").write_text(str(step)))
    draw = random.Random(1)
    for history in range(50):
        keep = draw.randrange(5)
        folder = CheckpointFolder(tmp_path / str(history), keep=keep)
        steps = sorted(draw.sample(range(1, 200_000_000), draw.randint(1, 12)))
        for step in steps:
            folder.save(step, TrainingState(model={}, optimizer={}, values={}))
            assert folder.steps()[-1] == step
        assert folder.steps() == (steps[-keep:] if keep else steps)


def test_a_full_disk_leaves_earlier_checkpoints(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=1, used=1, free=1000)
    with monkeypatch.context() as patched:
        patched.setattr(training.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ResourceError, match="1,000 are free"):
            folder.save(60, _state(60))
    calls = iter(range(1000))
    real = training.write_durably
    for fail_at in range(4):
        calls = iter(range(1000))

        def write(path: Path, content: bytes, fail_at: int = fail_at, calls: object = calls) -> None:
            if next(calls) == fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(path, content)

        with monkeypatch.context() as patched:
            patched.setattr(training, "write_durably", write)
            if fail_at < 3:
                with pytest.raises(ResourceError, match="disk is full"):
                    folder.save(60 + fail_at, _state(60))
        assert not list(folder.folder.glob(".unfinished-*"))
        newest = folder.newest()
        assert newest is not None
        verify(newest)


def test_passing_errors_are_retried(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, failures = training.write_durably, iter([errno.EIO, errno.ESTALE])

    def write(path: Path, content: bytes) -> None:
        code = next(failures, None)
        if code is not None:
            raise OSError(code, os.strerror(code))
        real(path, content)

    monkeypatch.setattr(training, "write_durably", write)
    with caplog.at_level(logging.WARNING):
        verify(folder.save(60, _state(60)))
    assert sum("again" in record.message for record in caplog.records) == 2


def test_persistent_errors_end_after_three_retries(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def write(path: Path, content: bytes) -> None:
        attempts.append(path)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(training, "write_durably", write)
    with pytest.raises(ResourceError, match="cannot be written"):
        folder.save(60, _state(60))
    assert len(attempts) == 4
    assert folder.newest() == folder.path(40)
