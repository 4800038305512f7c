"""How a model is trained, logged and saved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, Optional

from tencentpretrain.config.base import Section, setting
from tencentpretrain.config.launcher import parse_address, read_place
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import OPTIMIZERS, SCHEDULES


class OptimConfig(Section):
    """Optimizer and schedule; shared by pre-training and fine-tuning."""

    learning_rate: float = setting(2e-5, "largest learning rate", topic="optimization", ge=0)
    warmup: float = setting(0.1, "share of all updates during which the rate rises", topic="optimization", ge=0, le=1)
    lr_decay: float = setting(
        0.5, "tri_stage: share of all updates during which the rate falls", topic="optimization", ge=0, le=1
    )
    optimizer: str = setting("adamw", "optimizer", topic="optimization")
    scheduler: str = setting("linear", "learning-rate schedule, counted in optimizer updates", topic="optimization")
    weight_decay: float = setting(0.01, "decay of tensors with two or more dimensions", topic="optimization", ge=0)
    decay_groups: Literal["dimension", "name"] = setting(
        "dimension", "no decay for one-dimensional tensors, or by the old list of names", topic="optimization"
    )
    adam_beta1: float = setting(0.9, "AdamW", topic="optimization", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "AdamW", topic="optimization", ge=0, lt=1)
    adam_eps: float = setting(1e-6, "AdamW", topic="optimization", gt=0)
    adam_bias_correction: bool = setting(False, "AdamW: correct the first steps' moments", topic="optimization")
    max_grad_norm: Optional[float] = setting(None, "clip the global gradient norm", topic="optimization", gt=0)

    def problems(self) -> Iterator[str]:
        """Yields unknown names and impossible shares."""
        for key, registry in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULES)):
            try:
                registry.canonical(getattr(self, key))
            except ConfigError as error:
                yield f"{key}: {error}"
        if self.scheduler == "tri_stage" and self.warmup + self.lr_decay > 1:
            yield (
                f"lr_decay: warmup {self.warmup:g} and lr_decay {self.lr_decay:g} are shares of all updates "
                "and come to more than 1"
            )


class PrecisionConfig(Section):
    """Number formats, memory and compilation."""

    bf16: bool = setting(False, "bfloat16 autocast", topic="precision")
    fp16: bool = setting(False, "float16 autocast with dynamic loss scaling (GPU)", topic="precision")
    gradient_checkpointing: bool = setting(False, "recompute activations in backward", topic="precision")
    compile: bool = setting(False, "torch.compile the model", topic="precision")
    deterministic: bool = setting(False, "refuse operations without a fixed order", topic="precision")
    device: str = setting("auto", "auto, cpu, cuda or cuda:<index>", topic="precision")
    threads: Optional[int] = setting(None, "CPU threads; default all cores", topic="precision", ge=1)

    def problems(self) -> Iterator[str]:
        """Yields number formats and devices that cannot be."""
        if self.bf16 and self.fp16:
            yield "fp16: bf16 and fp16 are both on; choose one (bf16 needs no loss scaling)"
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            yield f"device: is {self.device!r}, but must be auto, cpu, cuda or cuda:<index>"
        elif self.fp16 and self.device == "cpu":
            yield "fp16: float16 training needs a GPU; on a CPU use bf16"


class TrainConfig(Section):
    """The pre-training loop."""

    output_model_path: str = setting(text="prefix of saved files; <prefix>-<step> per checkpoint", topic="run")
    pretrained_model_path: Optional[str] = setting(None, "initial weights", topic="run")
    total_steps: int = setting(100000, "micro-steps (batches)", topic="run", ge=1)
    save_checkpoint_steps: int = setting(10000, "micro-steps between checkpoints", topic="run", ge=1)
    report_steps: int = setting(100, "micro-steps between report lines", topic="run", ge=1)
    accumulation_steps: int = setting(1, "micro-steps per optimizer update", topic="run", ge=1)
    eval_steps: Optional[int] = setting(
        None, "micro-steps between validations; default as checkpoints", topic="run", ge=1
    )
    eval_batches: int = setting(100, "batches per validation", topic="run", ge=1)
    save_total_limit: int = setting(3, "newest checkpoints that are kept; 0: all", topic="run", ge=0)
    async_save: bool = setting(True, "write checkpoints while training goes on", topic="run")
    plan_check: bool = setting(True, "refuse a run that cannot fit into memory before it begins", topic="run")
    resume: bool = setting(True, "continue the newest complete checkpoint of this output path", topic="run")
    model_format: Literal["bin", "safetensors"] = setting(
        "bin", "form of the saved <prefix>-<step> weights", topic="run"
    )
    deep_init: bool = setting(False, "smaller initial weights in deep residual branches", topic="run")
    allow_missing: tuple[str, ...] = setting((), "prefixes of tensors that the initial weights may lack", topic="run")
    strict_loading: bool = setting(True, "refuse initial weights that do not fit wholly", topic="run")
    resize_vocab: bool = setting(
        False, "initial weights with another vocabulary size: copy the rows both have", topic="run"
    )
    allow_change: tuple[str, ...] = setting((), "keys that may differ from the run that is continued", topic="run")
    on_non_finite: Literal["stop", "skip"] = setting(
        "stop",
        "a loss or gradient that is not finite ends the run, or its update is left out (5 in a row)",
        topic="run",
    )
    time_limit: Optional[float] = setting(
        None, "minutes after which the step is finished, the run saved and ended with exit code 0", topic="run", gt=0
    )
    tensorboard: bool = setting(False, "write TensorBoard events into the run folder", topic="run")
    log_path: Optional[str] = setting(None, "extra log file", topic="run")
    log_level: Literal["ERROR", "INFO", "DEBUG", "NOTSET"] = setting("INFO", "console level", topic="run")
    log_file_level: Literal["ERROR", "INFO", "DEBUG", "NOTSET"] = setting("INFO", "log file level", topic="run")


class LoraConfig(Section):
    """Low-rank adapters on query and value projections."""

    use_lora: bool = setting(False, "train adapters only", topic="lora")
    lora_pretrained_model_path: Optional[str] = setting(None, "adapters to start from", topic="lora")
    lora_r: int = setting(8, "rank", topic="lora", ge=1)
    lora_alpha: int = setting(16, "scale; adapters count alpha / r", topic="lora", ge=1)
    lora_dropout: float = setting(0.0, "dropout before the adapter", topic="lora", ge=0, lt=1)


class LaunchConfig(Section):
    """Processes and engines of a run."""

    world_size: int = setting(1, "processes in all; taken from the launcher if there is one", topic="processes", ge=1)
    gpu_ranks: tuple[int, ...] = setting(
        (), "without a launcher: ranks to start here, one per GPU; with one process: its GPU", topic="processes"
    )
    master_ip: str = setting("tcp://localhost:12345", "without a launcher: where processes meet", topic="processes")
    backend: Literal["nccl", "gloo"] = setting("nccl", "how processes talk; on a CPU always gloo", topic="processes")
    join_timeout: int = setting(300, "seconds to wait at the start for all processes", topic="processes", ge=1)
    hang_timeout: int = setting(1800, "seconds without progress after which the run is ended", topic="processes", ge=1)
    local_rank: Optional[int] = setting(None, "set by launchers", topic="processes")
    global_rank: Optional[int] = setting(None, "set by launchers", topic="processes")
    fsdp: bool = setting(False, "cut weights and optimizer over all processes with torch's FSDP2", topic="processes")
    deepspeed: bool = setting(False, "train with DeepSpeed", topic="processes")
    enable_zero3: bool = setting(False, "DeepSpeed stage 3", topic="processes")
    deepspeed_config: str = setting(
        "models/deepspeed_config.json", "DeepSpeed JSON; its 'auto' is filled from the other flags", topic="processes"
    )
    deepspeed_checkpoint_activations: bool = setting(
        False, "recompute activations in backward, as --gradient_checkpointing does", topic="processes"
    )
    deepspeed_checkpoint_layers_num: int = setting(1, "blocks per checkpoint", topic="processes", ge=1)
    resume_from_checkpoint: Optional[str] = setting(None, "DeepSpeed directory to continue", topic="processes")
    tensor_model_parallel_size: int = setting(1, "processes that share each matrix", topic="processes", ge=1)
    pipeline_model_parallel_size: int = setting(1, "processes that share the layers", topic="processes", ge=1)
    virtual_pipeline_model_parallel_size: Optional[int] = setting(None, "accepted, no effect", topic="processes")
    distribute_checkpointed_activations: bool = setting(False, "split recomputed activations", topic="processes")

    def problems(self) -> Iterator[str]:
        """Yields what asks for more than one process or for another engine."""
        yield from self._process_problems()
        for name in ("enable_zero3", "resume_from_checkpoint"):
            if getattr(self, name) and not self.deepspeed:
                yield f"{name}: needs --deepspeed"
        if self.deepspeed_checkpoint_activations and not self.deepspeed:
            yield "deepspeed_checkpoint_activations: without DeepSpeed this is --gradient_checkpointing"

    def _process_problems(self) -> Iterator[str]:
        """Yields what contradicts the launcher, or cannot be started without one."""
        try:
            place = read_place()
            parse_address(self.master_ip)
        except ConfigError as error:
            yield from error.problems
            return
        if place is not None:
            if self.world_size not in (1, place.world_size):
                yield (
                    f"world_size: is {self.world_size}, but {place.launcher} started {place.world_size} processes; "
                    "leave it out"
                )
            return
        if self.world_size == 1 and len(self.gpu_ranks) > 1:
            yield f"world_size: is 1, but gpu_ranks names {len(self.gpu_ranks)} processes; give --world_size too"
        elif self.world_size > 1 and not self.gpu_ranks:
            yield (
                f"gpu_ranks: names no process to start, but world_size is {self.world_size}; give the ranks of this "
                "machine, such as --gpu_ranks 0 1, or start with torchrun"
            )
        elif self.world_size > 1:
            wrong = [rank for rank in self.gpu_ranks if not 0 <= rank < self.world_size]
            if wrong:
                yield f"gpu_ranks: names {wrong[0]}, but the last rank of {self.world_size} is {self.world_size - 1}"
            if len(set(self.gpu_ranks)) < len(self.gpu_ranks):
                yield f"gpu_ranks: names a rank twice: {' '.join(map(str, self.gpu_ranks))}"
