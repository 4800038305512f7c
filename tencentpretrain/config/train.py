"""How a model is trained, logged and saved."""

from __future__ import annotations

from typing import Literal, Optional

from tencentpretrain.config.base import Section, setting


class OptimConfig(Section):
    """Optimizer and schedule; shared by pre-training and fine-tuning."""

    learning_rate: float = setting(2e-5, "largest learning rate", topic="optimization", ge=0)
    warmup: float = setting(0.1, "share of all updates during which the rate rises", topic="optimization", ge=0, le=1)
    lr_decay: float = setting(0.5, "tri_stage: share of all updates during which the rate falls", topic="optimization", ge=0, le=1)
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


class PrecisionConfig(Section):
    """Number formats, memory and compilation."""

    bf16: bool = setting(False, "bfloat16 autocast", topic="precision")
    fp16: bool = setting(False, "float16 autocast with dynamic loss scaling (GPU)", topic="precision")
    gradient_checkpointing: bool = setting(False, "recompute activations in backward", topic="precision")
    compile: bool = setting(False, "torch.compile the model", topic="precision")
    deterministic: bool = setting(False, "refuse operations without a fixed order", topic="precision")
    device: str = setting("auto", "auto, cpu, cuda or cuda:<index>", topic="precision")
    threads: Optional[int] = setting(None, "CPU threads; default all cores", topic="precision", ge=1)


class TrainConfig(Section):
    """The pre-training loop."""

    output_model_path: str = setting(text="prefix of saved files; <prefix>-<step> per checkpoint", topic="run")
    pretrained_model_path: Optional[str] = setting(None, "initial weights", topic="run")
    total_steps: int = setting(100000, "micro-steps (batches)", topic="run", ge=1)
    save_checkpoint_steps: int = setting(10000, "micro-steps between checkpoints", topic="run", ge=1)
    report_steps: int = setting(100, "micro-steps between report lines", topic="run", ge=1)
    accumulation_steps: int = setting(1, "micro-steps per optimizer update", topic="run", ge=1)
    eval_steps: Optional[int] = setting(None, "micro-steps between validations; default as checkpoints", topic="run", ge=1)
    eval_batches: int = setting(100, "batches per validation", topic="run", ge=1)
    save_total_limit: int = setting(3, "newest checkpoints that are kept; 0: all", topic="run", ge=0)
    resume: bool = setting(True, "continue the newest complete checkpoint of this output path", topic="run")
    model_format: Literal["bin", "safetensors"] = setting("bin", "form of the saved <prefix>-<step> weights", topic="run")
    deep_init: bool = setting(False, "smaller initial weights in deep residual branches", topic="run")
    allow_missing: tuple[str, ...] = setting((), "prefixes of tensors that the initial weights may lack", topic="run")
    allow_change: tuple[str, ...] = setting((), "keys that may differ from the run that is continued", topic="run")
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
