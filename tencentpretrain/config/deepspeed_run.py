"""DeepSpeed in a run: its file beside the run's settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tencentpretrain.config.cli import Parsed
from tencentpretrain.config.data import DataConfig
from tencentpretrain.config.deepspeed import DeepSpeedSettings, Ours, Reading, read_deepspeed
from tencentpretrain.config.launcher import read_place
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.train import LaunchConfig, OptimConfig, PrecisionConfig, TrainConfig
from tencentpretrain.errors import ConfigError

_SECTIONS = {
    "batch_size": "data",
    "accumulation_steps": "train",
    "max_grad_norm": "optim",
    "bf16": "precision",
    "fp16": "precision",
}
"""Where a setting is that the file may give."""


def deepspeed_problems(parsed: Parsed) -> Iterator[str]:
    """Yields what is wrong with the file or contradicts the run's settings."""
    reading = _reading(parsed)
    if reading is not None:
        yield from reading.problems


def deepspeed_notices(parsed: Parsed) -> Iterator[str]:
    """Yields what the file says and something else decides."""
    reading = _reading(parsed)
    if reading is None:
        return
    yield from reading.notices
    layers = parsed.get(LaunchConfig).deepspeed_checkpoint_layers_num
    if layers > 1:
        yield f"deepspeed_checkpoint_layers_num: is {layers}, but each block is recomputed by itself; same numbers"


def with_deepspeed(parsed: Parsed) -> tuple[Parsed, DeepSpeedSettings | None]:
    """Returns the settings with those that only the DeepSpeed file gives, and what DeepSpeed is told."""
    reading = _reading(parsed)
    if reading is None:
        return parsed, None
    sections = dict(parsed.sections)
    for name, value in reading.adopted.items():
        section = _SECTIONS[name]
        sections[section] = sections[section].model_copy(update={name: value})
    if parsed.get(LaunchConfig).deepspeed_checkpoint_activations:
        sections["precision"] = sections["precision"].model_copy(update={"gradient_checkpointing": True})
    return replace(parsed, sections=sections), reading.settings


def _reading(parsed: Parsed) -> Reading | None:
    launch = parsed.get(LaunchConfig)
    if not launch.deepspeed:
        return None
    data, train, optim = parsed.get(DataConfig), parsed.get(TrainConfig), parsed.get(OptimConfig)
    precision = parsed.get(PrecisionConfig)
    ours = Ours(
        batch_size=data.batch_size,
        accumulation_steps=train.accumulation_steps,
        max_grad_norm=optim.max_grad_norm,
        bf16=precision.bf16,
        fp16=precision.fp16,
        zero3=launch.enable_zero3,
        given=frozenset(name for name in _SECTIONS if parsed.given(name)),
        processes=_processes(launch),
        hidden_size=parsed.get(ModelConfig).hidden_size,
        optimizer=optim.optimizer.lower(),
        device=precision.device,
        compile=precision.compile,
        model_parallel=launch.tensor_model_parallel_size * launch.pipeline_model_parallel_size,
    )
    return read_deepspeed(launch.deepspeed_config, ours)


def _processes(launch: LaunchConfig) -> int:
    """Returns how many processes share the data."""
    try:
        place = read_place()
    except ConfigError:  # reported by the launch section
        place = None
    total = place.world_size if place is not None else launch.world_size
    return max(total // (launch.tensor_model_parallel_size * launch.pipeline_model_parallel_size), 1)
