"""A run that is interrupted, in whatever way, ends as if it had been left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tencentpretrain.config.cli import part_of
from tencentpretrain.config.options import options_of
from tencentpretrain.config.resume_classes import CHECKED_BY_CONTENT, HARMLESS, LAYOUT, MATHS
from tencentpretrain.config.run import PRETRAIN_PARTS
from tencentpretrain.entry.pretrain import main as pretrain
from tencentpretrain.reliability.runs import prepare


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    return [*prepare("mlm", tmp_path, steps=20, save_steps=10), "--num_workers", "0"]


def _run(flags: list[str], output: Path, *more: str) -> int:
    return pretrain([*flags, "--output_model_path", str(output), *more])


def _metrics(output: Path) -> list[dict[str, Any]]:
    lines = Path(f"{output}.run/metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "timing"} for line in lines]


def _optimizer(output: Path, step: int) -> bytes:
    return Path(f"{output}.run/checkpoints/step-{step:08d}/optim-00000.safetensors").read_bytes()


def test_the_same_command_twice_is_bitwise_equal(flags: list[str], tmp_path: Path) -> None:
    outputs = [tmp_path / "first", tmp_path / "second"]
    for output in outputs:
        assert _run(flags, output) == 0
    assert Path(f"{outputs[0]}-20").read_bytes() == Path(f"{outputs[1]}-20").read_bytes()
    assert _metrics(outputs[0]) == _metrics(outputs[1])


def test_accumulation_with_a_partial_last_window_and_adafactor_resume_exactly(flags: list[str], tmp_path: Path) -> None:
    settings = ["--accumulation_steps", "3", "--optimizer", "adafactor", "--save_checkpoint_steps", "7"]
    alone, resumed = tmp_path / "alone", tmp_path / "resumed"
    assert _run(flags, alone, *settings) == 0
    assert sorted(path.name for path in tmp_path.glob("alone-*")) == ["alone-14", "alone-20", "alone-7"]
    assert _run(flags, resumed, *settings) == 0
    newest = Path(f"{resumed}.run/checkpoints/step-00000020")
    (newest / "model-00000.safetensors").write_bytes(b"damaged")
    assert _run(flags, resumed, *settings) == 0
    assert _optimizer(resumed, 20) == _optimizer(alone, 20)
    assert _metrics(resumed) == _metrics(alone)
    assert (newest.parent / "damaged" / newest.name).is_dir()


def test_a_finished_run_is_left_as_it_is(flags: list[str], tmp_path: Path) -> None:
    output = tmp_path / "model"
    assert _run(flags, output) == 0
    before = _metrics(output)
    assert _run(flags, output) == 0
    assert _metrics(output) == before


def test_changed_settings_data_and_vocabulary_are_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    assert _run(flags, output) == 0
    assert _run(flags, output, "--learning_rate", "0.5", "--batch_size", "3") == 2
    message = capsys.readouterr().err
    assert "learning_rate: was 0.001, is 0.5" in message
    assert "--allow_change batch_size learning_rate" in message
    assert _run(flags, output, "--total_steps", "25", "--allow_change", "total_steps", "--report_steps", "1") == 0
    assert Path(f"{output}-25").exists()

    flags[flags.index("--dataset_path") + 1] = str(tmp_path / "other")
    from tencentpretrain.entry.preprocess import main as preprocess

    (tmp_path / "other.txt").write_text("word1 word2 word3\n" * 50)
    position = flags.index("--vocab_path")
    data = ["--dataset_path", str(tmp_path / "other"), "--corpus_path", str(tmp_path / "other.txt")]
    assert preprocess([*data, *flags[position : position + 2], "--data_processor", "mlm"]) == 0
    capsys.readouterr()
    assert _run(flags, output, "--total_steps", "25") == 3
    assert "dataset_path has changed since" in capsys.readouterr().err


def test_all_checkpoints_damaged_is_no_fresh_start(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    assert _run(flags, output) == 0
    for state in tmp_path.glob("model.run/checkpoints/step-*/state.json"):
        state.write_text("{}")
    capsys.readouterr()
    assert _run(flags, output) == 4
    message = capsys.readouterr().err
    assert "step-00000010/state.json" in message
    assert "step-00000020/state.json" in message
    assert _run(flags, output, "--no-resume") == 0
    assert (tmp_path / "model.run" / "earlier" / "1" / "checkpoints").is_dir()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_resume_is_exact(flags: list[str], tmp_path: Path, number: int, code: int) -> None:
    flags = [*flags, "--total_steps", "120", "--save_checkpoint_steps", "1000"]
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    assert _run(flags, alone) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "tencentpretrain", "pretrain", *flags, "--output_model_path", str(stopped)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    metrics = Path(f"{stopped}.run/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert process.wait(60) == code
    assert list(tmp_path.glob("stopped.run/checkpoints/step-*"))
    assert _run(flags, stopped) == 0
    assert Path(f"{stopped}-120").read_bytes() == Path(f"{alone}-120").read_bytes()
    assert _metrics(stopped) == _metrics(alone)


def test_every_setting_has_a_class() -> None:
    keys = {option.key for part in map(part_of, PRETRAIN_PARTS) for option in options_of(part)}
    unclassified = keys - HARMLESS - CHECKED_BY_CONTENT - LAYOUT - MATHS
    assert not unclassified
    assert not HARMLESS & MATHS
