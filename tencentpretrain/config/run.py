"""A whole pre-training run, read and checked before anything heavy is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tencentpretrain.config.cli import BASE_CONFIG, Check, Parsed, parse_sections
from tencentpretrain.config.compatibility import (
    TEXT_PAIR_PROCESSORS,
    pretrain_notices,
    pretrain_problems,
)
from tencentpretrain.config.data import CARRIED, DataConfig
from tencentpretrain.config.decode import Origin
from tencentpretrain.config.deepspeed import DeepSpeedSettings
from tencentpretrain.config.deepspeed_run import deepspeed_notices, deepspeed_problems, with_deepspeed
from tencentpretrain.config.fully_sharded import fully_sharded_problems
from tencentpretrain.config.launcher import read_place
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.model_parallel import model_parallel_notices, model_parallel_problems
from tencentpretrain.config.options import Part
from tencentpretrain.config.train import LaunchConfig, LoraConfig, OptimConfig, PrecisionConfig, TrainConfig
from tencentpretrain.tokenizers.config import TokenizerConfig

TGT_TOKENIZER = Part(
    name="tgt_tokenizer", section=TokenizerConfig, prefix="tgt_", only_for=("data_processor", TEXT_PAIR_PROCESSORS)
)
PRETRAIN_PARTS: tuple[type | Part, ...] = (
    TrainConfig,
    DataConfig,
    OptimConfig,
    PrecisionConfig,
    TokenizerConfig,
    TGT_TOKENIZER,
    ModelConfig,
    LoraConfig,
    LaunchConfig,
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a pre-training run.

    `origin` maps each published key to where its value comes from. `tgt_tokenizer` is there when targets have a
    vocabulary of their own. `deepspeed` is there when DeepSpeed trains. `notices` are sentences a user should read
    though they stop nothing.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    precision: PrecisionConfig
    lora: LoraConfig
    launch: LaunchConfig
    tokenizer: TokenizerConfig
    tgt_tokenizer: TokenizerConfig | None
    origin: Mapping[str, Origin]
    config_path: str | None
    notices: tuple[str, ...] = ()
    deepspeed: DeepSpeedSettings | None = None


def load_run(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "pretrain.py",
    examples: Sequence[str] = (),
    checks: Sequence[Check] = (),
) -> RunConfig:
    """Reads a pre-training command line.

    Raises:
        ConfigError: with every problem of the run.
        SystemExit: after --help or --version.
    """
    parsed = parse_sections(
        prog,
        "Pre-trains a model on a data set written by preprocess.py.",
        PRETRAIN_PARTS,
        argv,
        examples=examples or _PRETRAIN_EXAMPLES,
        config_file=BASE_CONFIG,
        checks=(pretrain_problems, model_parallel_problems, deepspeed_problems, fully_sharded_problems, *checks),
        notices=(pretrain_notices, model_parallel_notices, deepspeed_notices),
        defaults=_settings_of_data_set,
    )
    parsed, deepspeed = with_deepspeed(parsed)
    precision, launch = parsed.get(PrecisionConfig), parsed.get(LaunchConfig)
    if launch.gpu_ranks and launch.world_size == 1 and read_place() is None and not parsed.given("device"):
        precision = precision.model_copy(update={"device": f"cuda:{launch.gpu_ranks[0]}"})
    return RunConfig(
        model=parsed.get(ModelConfig),
        data=parsed.get(DataConfig),
        train=parsed.get(TrainConfig),
        optim=parsed.get(OptimConfig),
        precision=precision,
        lora=parsed.get(LoraConfig),
        launch=launch,
        tokenizer=parsed.get(TokenizerConfig, "tokenizer"),
        tgt_tokenizer=target_tokenizer(parsed),
        origin=parsed.origin,
        config_path=parsed.config_path,
        notices=parsed.notices,
        deepspeed=deepspeed,
    )


def _settings_of_data_set(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the settings that `preprocess.py` left in the data set; whether it is whole is found on opening it."""
    header = Path(str(given.get("dataset_path", DataConfig.model_fields["dataset_path"].default))) / "header.json"
    try:
        settings = json.loads(header.read_bytes())["settings"]
        return {name: settings[name] for name in CARRIED if name in settings}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def target_tokenizer(parsed: Parsed) -> TokenizerConfig | None:
    """Returns the target side's tokenizer where the processor reads pairs of two languages."""
    used = parsed.get(DataConfig).data_processor in TEXT_PAIR_PROCESSORS
    return parsed.get(TokenizerConfig, TGT_TOKENIZER.name) if used else None


_PRETRAIN_EXAMPLES = (
    "pretrain.py --dataset_path dataset.pt --vocab_path vocab.txt --config_path models/bert/mini_config.json \\",
    "            --output_model_path runs/bert.bin --total_steps 10000 --learning_rate 1e-4 --bf16",
    "pretrain.py --dataset_path dataset.pt --vocab_path vocab.txt --config_path models/gpt2/config.json \\",
    "            --output_model_path runs/gpt2.bin --batch_size=8 --accumulation_steps=4 --max_grad_norm=1",
)
