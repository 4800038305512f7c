"""A plan from the settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tencentpretrain.config.data import DataConfig
from tencentpretrain.config.run import RunConfig
from tencentpretrain.plan.activations import FLOAT, Lengths, Numerics
from tencentpretrain.plan.flops import Flops, flops_of
from tencentpretrain.plan.machine import MIB, framework_bytes
from tencentpretrain.plan.memory import Memory, Moment, Training, moments_of, optimizer_bytes
from tencentpretrain.plan.parameters import Weight, weights_of
from tencentpretrain.plan.sharding import Sharding
from tencentpretrain.registry import OPTIMIZERS

MASKED_SHARE = 0.15
RUNS_SHARE = 0.13
"""Runs of masked tokens per token, where single tokens are chosen: 0.15 times 0.85."""
HEAP_GAPS = "gaps of the heap"
HEAP_SHARE, LARGE_SHARE = 0.32, 0.6
"""Of what is allocated on the CPU, what lies unused between it: the C library keeps freed blocks for the next step
(`engines/host_memory.py`), and tensors of other sizes do not fill them wholly. The largest blocks, those of logits, are
cut by the optimizer's first tensors, so the next step needs new ones. Measured with glibc: docs/plan.md."""
LOADER_BYTES = 60 * MIB
"""One process that draws samples: interpreter, numpy and tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take.

    Fields:
        parameters: numbers by part of the model, and "total" and "trained".
        memory: of each process.
        loader: bytes of the processes that draw samples, in the host's memory, per training process.
        global_batch: samples per update over all processes.
        checkpoint: bytes on disk of one checkpoint: "weights" and "optimizer".
    """

    parameters: Mapping[str, int]
    memory: Memory
    loader: int
    flops: Flops
    checkpoint: Mapping[str, int]
    global_batch: int
    lengths: Lengths
    training: Training


def lengths_of(data: DataConfig) -> Lengths:
    """Returns the shape of a micro-batch that a processor makes; lengths that depend on the text at their largest."""
    batch, source, processor = data.batch_size, data.seq_length, data.data_processor
    target, predicted = 0, source
    if processor == "llm_sft":
        source -= 1
    masked = round(MASKED_SHARE * source)
    if processor in ("bert", "albert", "mlm", "cls_mlm"):
        predicted = masked
    elif processor == "t5":
        target = predicted = 3 + masked + round(RUNS_SHARE * source)
    elif processor == "bart":
        target = predicted = source - 1
    elif processor == "gsg":
        target = predicted = data.tgt_seq_length - 1
    elif processor == "mt":
        target = predicted = data.tgt_seq_length
    elif processor == "cls":
        predicted = 0
    packed = data.full_sentences and processor in ("lm", "llm_pretrain", "mlm", "t5")
    return Lengths(batch=batch, source=source, target=target, predicted=batch * predicted, padded=not packed)


def plan_run(
    run: RunConfig, vocab_size: int, *, tgt_vocab_size: int | None = None, sharding: Sharding | None = None
) -> Plan:
    """Returns what a run will take.

    Args:
        run: all settings.
        vocab_size, tgt_vocab_size: rows of the word tables.
        sharding: how the work is spread over processes and whether they compute on a GPU.

    Raises:
        ConfigError: the model lacks a size.
    """
    sharding = sharding or Sharding()
    weights = weights_of(run.model, vocab_size, tgt_vocab_size=tgt_vocab_size, lora=run.lora)
    on_cpu = not sharding.other_device
    half = run.precision.bf16 or run.precision.fp16
    sharding = replace(sharding, half_weights=half and sharding.deepspeed)
    training = Training(
        lengths=lengths_of(run.data),
        numerics=Numerics(
            low=2 if half else FLOAT,
            on_cpu=on_cpu and not run.precision.compile,
            adapters=(run.lora.lora_r, run.lora.lora_dropout) if run.lora.use_lora else None,
        ),
        optimizer=OPTIMIZERS.canonical(run.optim.optimizer),
        accumulation=run.train.accumulation_steps,
        checkpointing=run.precision.gradient_checkpointing,
        sharding=sharding,
        saves_meanwhile=run.train.async_save and run.train.save_checkpoint_steps < run.train.total_steps,
    )
    state = optimizer_bytes(weights, training.optimizer)
    return Plan(
        parameters=_parameters(weights),
        memory=_memory(run, weights, training, state),
        loader=run.data.num_workers * LOADER_BYTES,
        flops=flops_of(run.model, weights, training.lengths, checkpointing=training.checkpointing),
        checkpoint={"weights": FLOAT * sum(weight.size for weight in weights), "optimizer": int(state)},
        global_batch=run.data.batch_size * run.train.accumulation_steps * sharding.data_size,
        lengths=training.lengths,
        training=training,
    )


def _parameters(weights: list[Weight]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for weight in weights:
        parts[weight.part] = parts.get(weight.part, 0) + weight.size
    trained = sum(weight.size for weight in weights if weight.trained)
    return {"total": sum(parts.values()), "trained": trained, **parts}


def _memory(run: RunConfig, weights: list[Weight], training: Training, state: float) -> Memory:
    sharding = training.sharding
    base = float(framework_bytes(other_device=sharding.other_device))
    moments = tuple(
        Moment(name=moment.name, parts={**moment.parts, HEAP_GAPS: _gaps(moment, sharding), "framework": base})
        for moment in moments_of(run.model, weights, training)
    )
    host: dict[str, float] = {}
    if sharding.other_device:
        count = sum(weight.size for weight in weights)
        trained = sum(weight.size for weight in weights if weight.trained)
        host = dict(sharding.host_bytes(state, count, trained))
        host["checkpoint copies"] = sharding.snapshot_bytes(FLOAT * count + state)
        host["framework"] = float(framework_bytes()) * 4  # with CUDA's libraries at work
    return Memory(device=max(moments, key=lambda moment: moment.total), host=host, moments=moments)


def _gaps(moment: Moment, sharding: Sharding) -> float:
    """Returns what the heap of a CPU process holds besides its tensors."""
    if sharding.other_device:
        return 0.0
    large = moment.parts.get("logits", 0.0) + moment.parts.get("working space", 0.0)
    copies = moment.parts.get("checkpoint copies", 0.0)  # they fill the gaps first
    return HEAP_SHARE * (moment.total - large - copies) + LARGE_SHARE * large


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns a plan as plain JSON; bytes are whole numbers."""

    def whole(parts: Mapping[str, float]) -> dict[str, int]:
        return {name: round(value) for name, value in parts.items() if value}

    peak = plan.memory.device
    return {
        "parameters": dict(plan.parameters),
        "memory_per_process": {"total": round(peak.total), "at": peak.name, **whole(peak.parts)},
        "host_memory_per_process": whole({**plan.memory.host, "loader": plan.loader}),
        "flops_per_token": {
            "forward": round(plan.flops.forward),
            "attention": round(plan.flops.attention),
            "training": round(plan.flops.training),
        },
        "checkpoint_bytes": {"total": sum(plan.checkpoint.values()), **plan.checkpoint},
        "global_batch": plan.global_batch,
    }
