"""What `--fsdp` cannot be combined with, said before a run starts."""

from __future__ import annotations

from collections.abc import Iterator

from tencentpretrain.config.cli import Parsed
from tencentpretrain.config.train import LaunchConfig, LoraConfig, OptimConfig, PrecisionConfig


def fully_sharded_problems(parsed: Parsed) -> Iterator[str]:
    """Yields what has to be changed for torch's fully sharded data parallelism."""
    launch = parsed.get(LaunchConfig)
    if not launch.fsdp:
        return
    if launch.deepspeed:
        yield "fsdp: is another way to do what --deepspeed does; give one of them"
    if launch.tensor_model_parallel_size * launch.pipeline_model_parallel_size > 1:
        yield "fsdp: cannot be combined with tensor or pipeline parallelism; --deepspeed with stage 1 can"
    if parsed.get(OptimConfig).optimizer == "adafactor":
        yield "optimizer: adafactor keeps rows and columns of whole matrices, which --fsdp cuts; use adamw"
    if parsed.get(LoraConfig).use_lora:
        yield "use_lora: adapters are too small to be worth cutting with --fsdp; train them without it"
    if parsed.get(PrecisionConfig).fp16:
        yield "fp16: --fsdp has no loss scaling over processes here; use --bf16"
