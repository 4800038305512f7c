"""DeepSpeed files: strict keys, "auto" from our settings, one source of truth, and the shipped files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tencentpretrain.config.deepspeed import DeepSpeedSettings, Ours, Reading, read_deepspeed
from tencentpretrain.config.deepspeed_keys import KEYS
from tencentpretrain.config.run import load_run
from tencentpretrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "models").glob("deepspeed*.json"))


def read(tmp_path: Path, content: Any, **ours: Any) -> Reading:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")
    return read_deepspeed(str(path), Ours(hidden_size=16, **ours))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"zero_optimizaton": {"stage": 2}}, "zero_optimizaton: unknown key; did you mean 'zero_optimization'?"),
        (
            {"zero_optimization": {"stage": 2, "ofload_optimizer": {}}},
            "zero_optimization.ofload_optimizer: unknown key; did you mean 'offload_optimizer'?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
            'offload_optimizer.device: is "gpu", but must be one of "none", "cpu", "nvme"',
        ),
        ({"fp16": {"loss_scale": "dynamic"}}, 'fp16.loss_scale: is "dynamic", but must be a number of at least 0'),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: is 4, but must be one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: is true, but must be one of"),
        ({"zero_optimization": 2}, "zero_optimization: is 2, but must be an object"),
        ({"zero_optimization": {"reduce_bucket_size": 0.5}}, "must be a whole number of at least 0"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, 'is "yes", but must be true or false'),
        ({"bf16": {"enabled": 1}}, "bf16.enabled: is 1, but must be true or false"),
        ({"wall_clock_breakdown": "auto"}, 'is "auto", but no setting of ours fills it; give true or false'),
        ({"fp32_allreduce": True}, 'has it no longer; write "communication_data_type": "fp32"'),
        ({"stage": 2, "train_batch_size": "auto"}, 'stage: belongs below "zero_optimization"'),
        ({"amp": {"enabled": True}}, "DeepSpeed 0.19 has it no longer"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast: is not supported; use --bf16 or --fp16"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "would change the numbers"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both on; choose one"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            'is "nvme", which this version does',
        ),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "stands twice, in lines 1 and 1"),
        ('{"train_batch_size": 8,}', "not valid JSON"),
        ({"model_type": "bert", "architectures": ["Bert"], "hidden_size": 8}, "this is a Hugging Face config (Bert)"),
        ({"emb_size": 8, "hidden_size": 8, "encoder": "transformer"}, "model config; it belongs to --config_path"),
        ({"tokenizer_class": "BertTokenizer"}, "tokenizer_config.json, not a DeepSpeed config"),
        ([], "holds a JSON list"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_what_is_wrong_with_a_file(tmp_path: Path, content: Any, expected: str) -> None:
    problems = "\n".join(read(tmp_path, content).problems)
    assert expected in problems
    assert str(tmp_path / "ds.json") in problems


def test_all_problems_at_once_with_lines(tmp_path: Path) -> None:
    content = '{\n "optimizr": {},\n "zero_optimization": {\n  "stage": 9\n },\n "fp16": {"enabled": "on"}\n}'
    problems = read(tmp_path, content).problems
    assert len(problems) == 3
    assert [f"line {number}" in problem for number, problem in zip((2, 4, 6), problems, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("content", "ours", "expected"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            {"batch_size": 8, "given": frozenset({"batch_size"})},
            "train_micro_batch_size_per_gpu: is 4, but --batch_size is 8",
        ),
        (
            {"gradient_accumulation_steps": 2},
            {"accumulation_steps": 4, "given": frozenset({"accumulation_steps"})},
            "gradient_accumulation_steps: is 2, but --accumulation_steps is 4",
        ),
        (
            {"gradient_clipping": 1.0},
            {"max_grad_norm": 0.5, "given": frozenset({"max_grad_norm"})},
            "gradient_clipping: is 1.0, but --max_grad_norm is 0.5",
        ),
        (
            {"bf16": {"enabled": False}},
            {"bf16": True, "given": frozenset({"bf16"})},
            "bf16.enabled: is false, but --bf16 is true",
        ),
        ({"fp16": {"enabled": True}}, {"bf16": True, "given": frozenset({"bf16"})}, "bf16 and fp16 are both on"),
        ({"fp16": {"enabled": True}}, {"device": "cpu"}, "float16 needs a GPU"),
        (
            {"train_batch_size": 30},
            {"batch_size": 4, "accumulation_steps": 2, "processes": 4},
            "is 30, but batch_size 4 x accumulation_steps 2 x 4 processes make 32",
        ),
        ({"zero_optimization": {"stage": 2}}, {"zero3": True}, "is 2, but --enable_zero3 asks for 3"),
        ({"zero_optimization": {"stage": 1}}, {"optimizer": "adafactor"}, "adafactor needs whole matrices"),
        ({"zero_optimization": {"stage": 3}}, {"compile": True}, "compile: is not supported with ZeRO stage 3"),
        (
            {"zero_optimization": {"stage": 2}},
            {"model_parallel": 2},
            "with tensor or pipeline parallelism only 0 and 1",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_contradictions_name_both_values(
    tmp_path: Path, content: dict[str, Any], ours: dict[str, Any], expected: str
) -> None:
    assert expected in "\n".join(read(tmp_path, content, **ours).problems)


def test_auto_is_filled_and_what_only_the_file_says_is_taken(tmp_path: Path) -> None:
    content = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.5,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "sub_group_size": 1e9,
        },
    }
    reading = read(tmp_path, content, bf16=True, given=frozenset({"bf16"}))
    assert not reading.problems
    assert reading.adopted == {"batch_size": 4, "max_grad_norm": 0.5}
    assert reading.settings.stage == 3
    zero = reading.settings.values["zero_optimization"]
    assert zero == {"reduce_bucket_size": 256, "stage3_param_persistence_threshold": 160, "sub_group_size": 10**9}
    assert reading.settings.values["data_types"] == {"grad_accum_dtype": "fp32"}
    assert len(reading.notices) == 2


def test_an_old_published_file_is_read_with_notices(tmp_path: Path) -> None:
    offload = {"device": "cpu", "pin_memory": True}
    content = {
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 100,
        "optimizer": {"type": "Adam", "params": {"lr": 2e-5, "weight_decay": 1e-2}},
        "fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
        "zero_optimization": {"stage": 2, "offload_param": offload, "offload_optimizer": offload},
        "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False},
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
    }
    reading = read(tmp_path, content)
    assert not reading.problems
    assert reading.adopted == {"batch_size": 1, "fp16": True}
    text = "\n".join(reading.notices)
    assert "optimizer: has no effect: --optimizer, --learning_rate and --weight_decay are used" in text
    assert "zero_optimization.offload_param: has no effect at stage 2" in text
    assert "activation_checkpointing" not in text
    assert reading.settings.offloads == {"cpu"}
    assert "optimizer" not in reading.settings.values


def test_stage_1_with_bf16_runs_as_stage_2(tmp_path: Path) -> None:
    content: dict[str, Any] = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    reading = read(tmp_path, content)
    assert reading.settings.stage == 2
    assert "runs as stage 2" in reading.notices[-1]
    content["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    assert read(tmp_path, content).settings.stage == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_shipped_files(path: Path, number_format: str) -> None:
    bf16 = number_format == "bf16"
    given = frozenset({"bf16"}) if bf16 else frozenset()
    reading = read_deepspeed(str(path), Ours(bf16=bf16, given=given, hidden_size=64, processes=2))
    assert not reading.problems
    assert "auto" not in json.dumps(reading.settings.values)
    assert reading.settings.stage == {"mp": 1, "zero3": 3}.get(path.stem.split("_")[1], 2)


def test_there_are_the_published_files() -> None:
    assert {"deepspeed_config", "deepspeed_mp_config", "deepspeed_zero3_config"} <= {path.stem for path in SHIPPED}


def test_every_key_that_deepspeed_declares_is_known() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    zero = KEYS["zero_optimization"]
    for section, known in (
        (DeepSpeedZeroConfig, zero),
        (DeepSpeedZeroOffloadOptimizerConfig, zero["offload_optimizer"]),
        (DeepSpeedZeroOffloadParamConfig, zero["offload_param"]),
        (DeepSpeedBF16Config, KEYS["bf16"]),
        (DeepSpeedFP16Config, KEYS["fp16"]),
    ):
        declared = {alias for name, info in section.model_fields.items() for alias in (name, info.alias) if alias}
        assert declared <= set(known), section


FLAGS = ["--output_model_path", "out", "--vocab_path", str(ROOT / "models/reserved_vocab.txt")]


def test_a_run_takes_the_file_up() -> None:
    run = load_run([*FLAGS, "--deepspeed", "--deepspeed_checkpoint_activations", "--batch_size", "8"])
    assert run.deepspeed is not None
    assert run.deepspeed.stage == 2
    assert run.precision.gradient_checkpointing
    assert load_run(FLAGS).deepspeed is None
    bf16 = load_run([*FLAGS, "--deepspeed", "--deepspeed_config", "models/deepspeed_zero2_bf16_config.json"])
    assert bf16.precision.bf16
    assert isinstance(bf16.deepspeed, DeepSpeedSettings)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--enable_zero3"], "enable_zero3: needs --deepspeed"),
        (["--resume_from_checkpoint", "d"], "resume_from_checkpoint: needs --deepspeed"),
        (["--deepspeed_checkpoint_activations"], "this is --gradient_checkpointing"),
        (["--deepspeed", "--enable_zero3"], "but --enable_zero3 asks for 3"),
        (["--deepspeed", "--deepspeed_config", "nowhere.json"], "nowhere.json: there is no such config file"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_run([*FLAGS, *flags])


def test_reading_needs_no_torch() -> None:
    code = "import sys, tencentpretrain.config.deepspeed_run; assert not {'torch', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
