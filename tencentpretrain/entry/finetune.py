"""What `finetune/run_*.py` and `tencentpretrain finetune <task>` run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tencentpretrain.config.base import Section
from tencentpretrain.config.cli import Parsed, parse_sections
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.options import options_of
from tencentpretrain.config.train import OptimConfig, PrecisionConfig
from tencentpretrain.entry.run import run_main
from tencentpretrain.registry import TASKS
from tencentpretrain.tasks.base import Task
from tencentpretrain.tasks.config import FinetuneConfig
from tencentpretrain.tokenizers.config import TokenizerConfig

SHARED_SECTIONS = (FinetuneConfig, TokenizerConfig, ModelConfig, OptimConfig, PrecisionConfig)


def main(task: str, argv: Sequence[str] | None = None) -> int:
    """Fine-tunes a registered task; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_main(lambda: _finetune(TASKS.get(task), arguments), debug="--debug" in arguments)


def _finetune(task: type[Task], argv: Sequence[str]) -> int:
    kinds: tuple[type[Section], ...] = (*SHARED_SECTIONS, *task.training_sections)
    parsed = parse_sections(
        f"run_{task.name}",
        f"Fine-tunes a model: {task.description}.",
        kinds,
        argv,
        examples=[
            f"python finetune/run_{task.name}.py --pretrained_model_path model.bin --vocab_path vocab.txt "
            "--config_path models/bert/base_config.json --train_path train.tsv --dev_path dev.tsv",
            *(f"  {line}" for line in ("a table:", *task.example.splitlines())),
        ],
    )
    from tencentpretrain.tasks.finetune import finetune

    result = finetune(task, {kind: parsed.get(kind) for kind in kinds}, published_settings(parsed), argv)
    final = result.test or result.dev
    print(final.text)
    return 0


def published_settings(parsed: Parsed) -> dict[str, object]:
    """Returns all settings of a run as a config file would hold them."""
    return {
        option.key: option.outside(getattr(parsed.sections[part.name], option.field))
        for part in parsed.parts
        for option in options_of(part)
    }
