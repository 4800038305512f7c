"""Inference: a fine-tuned model, a table in, a prediction file out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tencentpretrain.checkpoint.atomic import write_text
from tencentpretrain.checkpoint.loading import LoadReport, load_checkpoint
from tencentpretrain.config.base import Section
from tencentpretrain.config.export import model_to_published
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.options import Part, options_of, show
from tencentpretrain.config.train import PrecisionConfig
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.errors import CheckpointMismatch
from tencentpretrain.tasks.base import Task
from tencentpretrain.tasks.config import InferConfig
from tencentpretrain.tasks.predict import batch_width, build_task_model, predict_logits, refuse, refuse_non_finite
from tencentpretrain.tasks.tsv import read_table
from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer
from tencentpretrain.tokenizers.base import Tokenizer

_MODEL = Part(name="model", section=ModelConfig)
_WITHOUT_EFFECT = {
    "dropout",
    "target",
    "labels_num",
    "decoder",
    "decoder_layers_num",
    "tgt_embedding",
    "max_seq_length",
}
"""Keys that do not change what a fine-tuned model predicts, or whose misfit the tensors' shapes show."""


@dataclass(frozen=True, kw_only=True)
class InferResult:
    """How many rows were predicted, and how the model was loaded."""

    num_rows: int
    loading: LoadReport


def infer(task_type: type[Task], sections: Mapping[type[Section], Any]) -> InferResult:
    """Predicts every row of a table, in order.

    Args:
        sections: values of `InferConfig`, `ModelConfig`, `TokenizerConfig`, `PrecisionConfig` and of the task's own.

    Raises:
        DataFormatError, ConfigError, CheckpointMismatch: something given is not usable; nothing was written.
        NonFiniteError: a prediction is no number.
        ResourceError: the prediction file cannot be written.
    """
    run: InferConfig = sections[InferConfig]
    config: ModelConfig = sections[ModelConfig]
    refuse(task_type.problems(config, run.seq_length, inference=True))
    task = task_type.for_inference(sections)
    table = read_table(run.test_path, required=task.unlabelled_columns)
    trained = read_note(run.load_model_path, "task.json")
    if "columns" in trained:
        task.check_same_input(trained["columns"], table)
    tokenizer = build_tokenizer(sections[TokenizerConfig])
    refuse_other_tokenizer(run.load_model_path, tokenizer)
    refuse_other_settings(run.load_model_path, config)
    engine = LocalEngine(sections[PrecisionConfig])
    model = build_task_model(task, config, tokenizer)
    report = load_checkpoint(model, run.load_model_path)
    engine.place(model)
    examples = task.examples(table, tokenizer, run.seq_length, labelled=False)
    logits = predict_logits(
        model,
        examples,
        batch_size=run.batch_size,
        pad_id=tokenizer.pad_id,
        width=batch_width(config, run.seq_length),
        engine=engine,
    )
    refuse_non_finite(logits, run.test_path)
    lines = task.prediction_lines(logits, examples)
    write_text(run.prediction_path, "\n".join(lines) + "\n")
    return InferResult(num_rows=len(examples), loading=report)


def read_note(model_path: str, name: str) -> dict[str, Any]:
    """Returns a note that fine-tuning left beside a model; empty if there is none."""
    try:
        found = json.loads((Path(f"{model_path}.run") / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def refuse_other_settings(model_path: str, config: ModelConfig) -> None:
    """Compares the model's settings with those noted when it was fine-tuned, where there is such a note.

    Raises:
        CheckpointMismatch: a setting differs that would change predictions without changing any tensor's shape.
    """
    noted = read_note(model_path, "config.json")
    given = model_to_published(config)
    ours = {option.key for option in options_of(_MODEL) if option.topic != "heads"} - _WITHOUT_EFFECT
    differing = [key for key in sorted(ours) if noted.get(key) != given.get(key)] if noted else []
    if differing:
        shown = [f"  {key}: now {show(given.get(key))}, fine-tuned with {show(noted.get(key))}" for key in differing]
        raise CheckpointMismatch(
            "\n".join([f"{model_path} was fine-tuned with other settings; give the same config and flags", *shown])
        )


def refuse_other_tokenizer(model_path: str, tokenizer: Tokenizer) -> None:
    """Compares the tokenizer with the one noted when the model was fine-tuned, where there is such a note.

    Raises:
        CheckpointMismatch: they cut text differently.
    """
    trained = read_note(model_path, "tokenizer.json")
    if trained.get("fingerprint") in (None, tokenizer.fingerprint):
        return
    known = ", ".join(
        f"{key} {trained[key]}" for key in ("tokenizer", "vocab_path", "spm_model_path") if trained.get(key)
    )
    raise CheckpointMismatch(
        f"{model_path} was fine-tuned with another tokenizer ({known}, {trained.get('vocab_size')} tokens) than "
        f"{tokenizer.source} ({tokenizer.vocab_size} tokens); give the same flags, or remove "
        f"{model_path}.run/tokenizer.json if it is wrong"
    )
