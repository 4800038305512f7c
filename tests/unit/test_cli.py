"""The commands from outside: help, versions, exit codes, speed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tencentpretrain import errors
from tencentpretrain.config.cli import part_of
from tencentpretrain.config.options import options_of
from tencentpretrain.config.run import PRETRAIN_PARTS
from tencentpretrain.entry.main import COMMANDS, available, main
from tencentpretrain.entry.run import run_main
from tencentpretrain.registry import Registry, closest

ROOT = Path(__file__).resolve().parents[2]
SLOW_MACHINE = float(os.environ.get("TENCENTPRETRAIN_TEST_PATIENCE", "3"))


def run(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=cwd, check=False)


# Exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 2),
        (errors.MethodConflict("x"), 2),
        (errors.DataFormatError("x"), 3),
        (errors.CheckpointMismatch("x"), 4),
        (errors.ResourceError("x"), 5),
        (errors.NonFiniteError("x"), 6),
        (MemoryError(), 5),
        (OSError(28, "No space left on device"), 5),
        (FileNotFoundError(2, "No such file"), 1),
        (ValueError("x"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(0), 0),
        (SystemExit(3), 3),
        (SystemExit("sentence"), 1),
        (SystemExit(None), 0),
    ],
)
def test_errors_become_exit_codes(error: BaseException, code: int) -> None:
    def fail() -> int:
        raise error

    assert run_main(fail, debug=False) == code


def test_a_known_error_is_its_sentence_and_an_unknown_one_names_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise errors.DataFormatError("corpus.txt, line 3: is not JSON")

    def stumble() -> int:
        return int("x")

    run_main(fail, debug=False)
    assert capsys.readouterr().err == "error: corpus.txt, line 3: is not JSON\n"
    run_main(stumble, debug=False)
    message = capsys.readouterr().err
    assert "unexpected ValueError" in message
    assert "test_cli.py" in message
    assert "Traceback" not in message
    run_main(stumble, debug=True)
    assert "Traceback" in capsys.readouterr().err


def test_return_values() -> None:
    assert run_main(lambda: None, debug=False) == 0
    assert run_main(lambda: 4, debug=False) == 4


# The console command


def test_commands_listed_are_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = set(re.findall(r"^  (\S+)", capsys.readouterr().out, re.MULTILINE))
    assert listed == set(available())
    for name, (module, _) in COMMANDS.items():
        assert (name in listed) == (ROOT / "tencentpretrain/entry" / f"{module}.py").exists()


def test_no_command_and_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["preproces"]) == 2
    assert "did you mean 'preprocess'?" in capsys.readouterr().err
    assert main(["list", "encoder"]) == 2
    assert "did you mean 'encoders'?" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"tencentpretrain \d+\.\d+.*\n", capsys.readouterr().out)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert {"word", "pos", "seg"} <= set(names["embeddings"])
    assert main(["list", "decoders"]) == 0
    assert capsys.readouterr().out.split() == ["decoders", "transformer"]


def test_task_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune"]) == 2
    assert "classifier" in capsys.readouterr().out
    assert main(["finetune", "clasifier"]) == 2
    assert "did you mean 'classifier'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted({*available()} - {"finetune", "infer"}))
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage:")


@pytest.mark.parametrize("script", ["pretrain.py", "preprocess.py", "finetune/run_classifier.py", "inference/run_classifier_infer.py"])  # fmt: skip  # noqa: E501
def test_help_of_scripts_from_elsewhere(script: str, tmp_path: Path) -> None:
    path = ROOT / script
    if not path.exists():
        pytest.fail(f"{script} is promised")
    began = time.perf_counter()
    result = run(str(path), "--help", cwd=tmp_path)
    seconds = time.perf_counter() - began
    assert result.returncode == 0, result.stderr
    assert "examples:" in result.stdout
    assert seconds < SLOW_MACHINE, "it takes 0.3 s on an idle machine"


def test_help_lists_every_flag_with_default_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--help"]) == 0
    text = capsys.readouterr().out
    for option in (option for part in map(part_of, PRETRAIN_PARTS) for option in options_of(part)):
        assert (re.search(rf"^  --(\[no-\])?{option.key}\b", text, re.MULTILINE) is not None) == option.flag, option.key
    flat = " ".join(text.split())
    assert "largest learning rate (default 2e-05)" in flat
    assert "(one of fully_visible, causal, causal_with_prefix; default fully_visible)" in flat
    assert "(required)" in flat


def test_a_wrong_run_says_all_and_exits_with_2_before_torch(tmp_path: Path) -> None:
    code = "import sys; from tencentpretrain.entry.main import main; rc = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(rc)"  # noqa: E501
    result = run(
        "-c", code, "pretrain", "--config_path", "models/bert/tiny_config.json", "--batchsize", "3", cwd=tmp_path
    )
    assert result.returncode == 2
    assert "did you mean '--batch_size'?" in result.stderr
    assert "--output_model_path: is required" in result.stderr
    assert "vocab_path: tokenizer 'bert' needs a vocabulary" in result.stderr


def test_explain_config(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output_model_path", "out", "--vocab_path", "v.txt", "--learning_rate", "1e-4"]
    assert main(["explain-config", "--config_path", "models/bert/mini_config.json", *flags, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["learning_rate"] == {
        "key": "learning_rate",
        "value": 1e-4,
        "source": "--learning_rate",
        "owner": "OptimConfig",
    }
    assert rows["heads_num"]["source"] == "models/bert/mini_config.json:6"
    assert rows["warmup"]["source"] == "default"
    assert main(["explain-config", "--config_path", "models/bert/mini_config.json", *flags, "--given"]) == 0
    assert re.search(r"^seed ", capsys.readouterr().out, re.MULTILINE) is None


# Names


def test_closest() -> None:
    assert closest("heads_nmu", ["heads_num", "layers_num"]) == "heads_num"
    assert closest("HEADS-NUM", ["heads_num", "layers_num"]) == "heads_num"
    assert closest("zzzz", ["heads_num", "layers_num"]) is None


def test_a_component_registered_twice_is_refused() -> None:
    registry: Registry[type] = Registry("thing", "layers", "THINGS")
    registry.register("a")(int)
    with pytest.raises(ValueError, match="twice"):
        registry.register("a")(str)


def test_public_names_come_without_torch() -> None:
    code = "import sys, tencentpretrain as t; t.load_config; assert 'torch' not in sys.modules; print(dir(t))"
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert "build_model" in result.stdout
