"""What `finetune/run_*.py` and `tencentpretrain finetune <task>` run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from tencentpretrain.config.base import Section
from tencentpretrain.config.cli import Parsed, parse_sections
from tencentpretrain.config.export import to_published
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.train import OptimConfig, PrecisionConfig
from tencentpretrain.entry.run import run_main
from tencentpretrain.registry import TASKS
from tencentpretrain.tasks.base import Task
from tencentpretrain.tasks.config import FinetuneConfig, SwitchedSection
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
        checks=[lambda found: task.problems(found.get(ModelConfig), found.get(FinetuneConfig).seq_length)],
        notices=[_idle_settings],
    )
    for notice in parsed.notices:
        print(f"note: {notice}", file=sys.stderr)
    from tencentpretrain.tasks.finetune import finetune

    result = finetune(task, {kind: parsed.get(kind) for kind in kinds}, to_published(parsed, run_paths=True), argv)
    final = result.test or result.dev
    print(final.text)
    return 0


def _idle_settings(parsed: Parsed) -> Iterator[str]:
    """Yields flags that were given and do nothing because their switch is off."""
    for section in parsed.sections.values():
        if isinstance(section, SwitchedSection):
            for key, switch in section.idle().items():
                if parsed.given(key):
                    yield f"{key}: has no effect without {switch}"
