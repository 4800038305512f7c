"""Which models and settings tensor and pipeline parallelism can serve."""

from __future__ import annotations

from collections.abc import Iterator

from tencentpretrain.config.cli import Parsed
from tencentpretrain.config.launcher import read_place
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.train import LaunchConfig, LoraConfig, OptimConfig, PrecisionConfig, TrainConfig
from tencentpretrain.errors import ConfigError

_TENSOR, _PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"


def model_parallel_problems(parsed: Parsed) -> Iterator[str]:
    """Yields what cannot be combined with a model that is cut over processes."""
    launch, model = parsed.get(LaunchConfig), parsed.get(ModelConfig)
    tensor, pipeline = launch.tensor_model_parallel_size, launch.pipeline_model_parallel_size
    if tensor * pipeline == 1:
        return
    key = _TENSOR if tensor > 1 else _PIPELINE
    yield from _world_problems(launch)
    if model.encoder != "transformer" or model.decoder not in (None, "transformer"):
        other = f"encoder {model.encoder!r}" if model.encoder != "transformer" else f"decoder {model.decoder!r}"
        yield f"{key}: only transformers can be cut over processes, not {other}"
        return
    if "clr" in model.target:
        yield f"{key}: target 'clr' compares the batches of all processes and cannot be cut"
    if parsed.get(LoraConfig).use_lora:
        yield f"use_lora: adapters are not cut over processes; leave {key} out"
    if parsed.get(PrecisionConfig).compile:
        yield f"compile: cannot be combined with {key}; leave one of them out"
    if tensor > 1:
        yield from _tensor_problems(model, tensor, parsed.get(OptimConfig).optimizer)
    if pipeline > 1:
        yield from _pipeline_problems(model, pipeline)


def model_parallel_notices(parsed: Parsed) -> Iterator[str]:
    """Yields settings that waste processes or have no effect."""
    launch = parsed.get(LaunchConfig)
    steps = parsed.get(TrainConfig).accumulation_steps
    stages = launch.pipeline_model_parallel_size
    if stages > 1 and steps < stages:
        yield (
            f"accumulation_steps: is {steps}, so the {stages} stages of the pipeline wait for each other most of the "
            f"time; {4 * stages} and more keep them busy"
        )
    if launch.deepspeed and launch.tensor_model_parallel_size * stages > 1:
        yield (
            "deepspeed: with tensor or pipeline parallelism its file's ZeRO stage, sizes and number formats count; "
            "offloading and the rest have no effect"
        )
    if launch.virtual_pipeline_model_parallel_size:
        yield "virtual_pipeline_model_parallel_size: has no effect"
    if launch.distribute_checkpointed_activations:
        yield "distribute_checkpointed_activations: has no effect"


def _world_problems(launch: LaunchConfig) -> Iterator[str]:
    try:
        place = read_place()
    except ConfigError:  # reported by the launch section
        return
    world = place.world_size if place is not None else launch.world_size
    tensor, pipeline = launch.tensor_model_parallel_size, launch.pipeline_model_parallel_size
    if world % (tensor * pipeline):
        product = f"{_TENSOR} {tensor} x {_PIPELINE} {pipeline} = {tensor * pipeline}"
        started = f"{world} processes" if world > 1 else "one process"
        key = _TENSOR if tensor > 1 else _PIPELINE
        yield f"{key}: the run has {started}, but must have a multiple of {product}; start with torchrun"


def _tensor_problems(model: ModelConfig, tensor: int, optimizer: str) -> Iterator[str]:
    heads, kv_heads = model.num_heads or 0, model.num_kv_heads or model.num_heads or 0
    if heads % tensor:
        yield f"{_TENSOR}: {tensor} processes cannot share {heads} heads evenly (heads_num)"
    elif kv_heads and kv_heads % tensor and tensor % kv_heads:
        yield (
            f"{_TENSOR}: is {tensor}, but must divide local_kv_heads_num {kv_heads} or be a multiple of it, so that "
            "each process has whole groups of heads"
        )
    if (model.feed_forward_size or tensor) < tensor:
        yield f"{_TENSOR}: {tensor} processes cannot share feedforward_size {model.feed_forward_size}"
    if optimizer.lower() == "adafactor":
        yield f"optimizer: adafactor's row and column means need whole matrices, which {_TENSOR} cuts; use adamw"


def _pipeline_problems(model: ModelConfig, pipeline: int) -> Iterator[str]:
    layers = (model.num_layers or 0) + ((model.num_decoder_layers or 0) if model.decoder else 0)
    if layers < pipeline:
        yield f"{_PIPELINE}: is {pipeline}, but the model has only {layers} layers"
    if model.residual_attention:
        yield f"residual_attention: hands scores from layer to layer, which stages do not; leave {_PIPELINE} out"
