"""What `inference/run_*_infer.py` and `tencentpretrain infer <task>` run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tencentpretrain.config.base import Section
from tencentpretrain.config.cli import parse_sections
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.train import PrecisionConfig
from tencentpretrain.entry.run import run_main
from tencentpretrain.registry import TASKS
from tencentpretrain.tasks.base import Task
from tencentpretrain.tasks.config import InferConfig
from tencentpretrain.tokenizers.config import TokenizerConfig

SHARED_SECTIONS = (InferConfig, TokenizerConfig, ModelConfig, PrecisionConfig)


def main(task: str, argv: Sequence[str] | None = None) -> int:
    """Writes the predictions of a registered task; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_main(lambda: _infer(TASKS.get(task), arguments), debug="--debug" in arguments)


def _infer(task: type[Task], argv: Sequence[str]) -> int:
    kinds: tuple[type[Section], ...] = (*SHARED_SECTIONS, *task.inference_sections)
    parsed = parse_sections(
        f"run_{task.name}_infer",
        f"Predicts with a fine-tuned model: {task.description}.",
        kinds,
        argv,
        config_required=True,
        config_file=None,
        examples=[
            f"python inference/run_{task.name}_infer.py --load_model_path models/finetuned_model.bin "
            "--vocab_path vocab.txt --config_path models/bert/base_config.json --test_path test.tsv "
            "--prediction_path prediction.tsv --labels_num 2"
        ],
        checks=[lambda found: task.problems(found.get(ModelConfig), found.get(InferConfig).seq_length, inference=True)],
    )
    for notice in parsed.notices:
        print(f"note: {notice}", file=sys.stderr)
    from tencentpretrain.tasks.infer import infer

    result = infer(task, {kind: parsed.get(kind) for kind in kinds})
    if result.loading.migrated or result.loading.untied:
        print(f"note: {result.loading.text()}", file=sys.stderr)
    print(f"{result.num_rows} predictions written to {parsed.get(InferConfig).prediction_path}")
    return 0
