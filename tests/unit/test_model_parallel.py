"""What cannot be cut over processes is refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tencentpretrain.config.run import load_run
from tencentpretrain.errors import ConfigError

BASE: dict[str, Any] = {
    "emb_size": 16, "hidden_size": 16, "feedforward_size": 32, "heads_num": 4, "layers_num": 2, "hidden_act": "gelu",
    "max_seq_length": 16, "embedding": ["word", "pos"], "encoder": "transformer", "mask": "causal", "target": ["lm"],
}  # fmt: skip


def load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, processes: int = 2, **model: Any
) -> tuple[str, ...]:
    """Returns the problems of a run on that many processes."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**BASE, **model}))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes)}.items():
        monkeypatch.setenv(name, value)
    argv = ["--config_path", str(config), "--vocab_path", str(tmp_path / "vocab.txt"), "--data_processor", "lm"]
    argv += ["--dataset_path", str(tmp_path), "--output_model_path", str(tmp_path / "model"), "--seq_length", "16"]
    try:
        run = load_run([*argv, *flags])
    except ConfigError as error:
        return error.problems
    assert run.launch.tensor_model_parallel_size * run.launch.pipeline_model_parallel_size <= processes
    return ()


TENSOR, PIPELINE = ("--tensor_model_parallel_size", "2"), ("--pipeline_model_parallel_size", "2")


@pytest.mark.parametrize("flags", [TENSOR, PIPELINE, ()])
def test_what_can_be_cut_is_accepted(flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(tmp_path, monkeypatch, *flags) == ()


@pytest.mark.parametrize(
    ("flags", "model", "processes", "sentence"),
    [
        (TENSOR, {}, 3, "3 processes, but must have a multiple of tensor_model_parallel_size 2"),
        (TENSOR, {}, 1, "one process, but must have a multiple"),
        ((*TENSOR, *PIPELINE), {}, 2, "= 4; start with torchrun"),
        (TENSOR, {"heads_num": 1}, 2, "2 processes cannot share 1 heads evenly"),
        (("--tensor_model_parallel_size", "2"), {"heads_num": 6, "hidden_size": 24, "emb_size": 24,
          "local_kv_heads_num": 3}, 2, "must divide local_kv_heads_num 3 or be a multiple"),
        (TENSOR, {"encoder": "lstm"}, 2, "only transformers can be cut over processes, not encoder 'lstm'"),
        ((*TENSOR, "--optimizer", "adafactor"), {}, 2, "adafactor's row and column means need whole matrices"),
        ((*TENSOR, "--compile"), {}, 2, "compile: cannot be combined with tensor_model_parallel_size"),
        ((*PIPELINE, "--use_lora"), {}, 2, "use_lora: adapters are not cut over processes"),
        (("--pipeline_model_parallel_size", "4"), {}, 4, "is 4, but the model has only 2 layers"),
        (PIPELINE, {"residual_attention": True}, 2, "hands scores from layer to layer"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(
    flags: tuple[str, ...],
    model: dict[str, Any],
    processes: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problems = load(tmp_path, monkeypatch, *flags, processes=processes, **model)
    assert [problem for problem in problems if sentence in problem], problems
    assert len(problems) == 1, problems


def test_adafactor_goes_with_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(tmp_path, monkeypatch, *PIPELINE, "--optimizer", "adafactor") == ()


def test_deepspeed_splits_the_optimizer_of_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deepspeed.json"
    for stage, accepted in ((0, True), (1, True), (2, False), (3, False)):
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        problems = load(tmp_path, monkeypatch, *TENSOR, "--deepspeed", "--deepspeed_config", str(path))
        assert (problems == ()) == accepted, problems
