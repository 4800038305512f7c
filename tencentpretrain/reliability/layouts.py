"""The same run on every layout: losses and gradient norms step by step beside one process, and resuming across layouts.

Each layout runs in processes forked from one that has imported everything, and meets over gloo.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tencentpretrain.checkpoint.loading import load_tensors
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.train import OptimConfig, PrecisionConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.engines.base import Engine, MicroStep
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.engines.processes import whole_world
from tencentpretrain.engines.replicas import ReplicaEngine
from tencentpretrain.errors import PeerError
from tencentpretrain.model import build_model
from tencentpretrain.optim.build import build_optimizer, build_schedule, set_learning_rate
from tencentpretrain.train.labels import count_labels

VOCAB_SIZE = 101
"""Odd, so that a vocabulary cut over processes has to be padded."""

GLOBAL_BATCH = 8
MICRO_STEPS = 2
LENGTH = 16

_BODY: Mapping[str, Any] = {
    "emb_size": 32, "hidden_size": 32, "feed_forward_size": 64, "num_heads": 4, "num_layers": 4, "hidden_act": "gelu",
    "max_seq_length": 32, "dropout": 0.0, "encoder": "transformer",
}  # fmt: skip
MODELS: Mapping[str, ModelConfig] = {
    "bert": ModelConfig(
        **_BODY, embedding=("word", "pos", "seg"), mask="fully_visible", target=("mlm", "sp"), tie_weights=True
    ),
    "gpt2": ModelConfig(
        **_BODY, embedding=("word", "pos"), mask="causal", layernorm_positioning="pre", target=("lm",),
        tie_weights=True, embedding_layernorm=False,
    ),
    "t5": ModelConfig(
        **_BODY, embedding=("word",), tgt_embedding=("word",), decoder="transformer", num_decoder_layers=4,
        mask="fully_visible", layernorm_positioning="pre", layernorm="t5", relative_position_embedding=True,
        transformer_bias=False, attention_scale=False, share_embedding=True, tie_weights=True, target=("lm",),
        embedding_layernorm=False, lm_bias=False,
    ),
    "llama": ModelConfig(
        **{**_BODY, "hidden_act": "silu"}, num_kv_heads=2, feed_forward="gated", layernorm="rms", mask="causal",
        layernorm_positioning="pre", rotary_position_embedding=True, transformer_bias=False, lm_bias=False,
        embedding=("word",), target=("lm",), embedding_layernorm=False,
    ),
}  # fmt: skip
"""Four-layer models of the four families, without dropout."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a run did, step by step.

    Fields:
        losses: loss of each step, divided by all its labels.
        norms: gradient norm of each step before clipping.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


MakeEngine = Callable[[], Engine]
"""Called in each process after the processes have met."""


def fork(world_size: int, work: Callable[[int], Any], *, seconds: float = 300.0) -> Any:
    """Runs `work(rank)` in forked processes that have met over gloo and returns what rank 0 returned, through JSON.

    Raises:
        PeerError: a process failed; the message holds its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork_one(rank, world_size, work, Path(folder)) for rank in range(world_size)]
        failed = [rank for rank, child in enumerate(children) if os.waitpid(child, 0)[1]]
        if failed:
            reports = [Path(folder) / f"error-{rank}.txt" for rank in failed]
            texts = [report.read_text() for report in reports if report.exists()]
            raise PeerError(f"processes {failed} of {world_size} failed\n" + "\n".join(texts))
        return json.loads((Path(folder) / "result.json").read_text())


def _fork_one(rank: int, world_size: int, work: Callable[[int], Any], folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        if world_size > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
        result = work(rank)
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(result))
        status = 0
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        os._exit(status)


_ON_CPU = PrecisionConfig(device="cpu", threads=1)


def _local() -> Engine:
    return LocalEngine(_ON_CPU)


def _replicas() -> Engine:
    return ReplicaEngine(_ON_CPU, whole_world())


def _sharded() -> Engine:
    from tencentpretrain.engines.fsdp import ShardedEngine

    return ShardedEngine(_ON_CPU, whole_world())


def _deepspeed(stage: int) -> MakeEngine:
    def make() -> Engine:
        from tencentpretrain.config.deepspeed import DeepSpeedSettings
        from tencentpretrain.engines.deepspeed import build_engine

        os.environ["DS_ACCELERATOR"] = "cpu"
        cut_all = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # small tensors too
        return build_engine(
            _ON_CPU, DeepSpeedSettings(stage=stage, values=cut_all if stage == 3 else {}), whole_world()
        )

    return make


def _mesh(tensor_size: int, pipeline_size: int, shard_optimizer: bool = False) -> MakeEngine:
    def make() -> Engine:
        from tencentpretrain.engines.mesh import MeshEngine
        from tencentpretrain.parallel.mesh import build_mesh

        return MeshEngine(_ON_CPU, build_mesh(tensor_size, pipeline_size), shard_optimizer=shard_optimizer)

    return make


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """An engine on a number of processes."""

    name: str
    world_size: int
    make: MakeEngine


ARRANGEMENTS = (
    Arrangement(name="one process", world_size=1, make=_local),
    *(Arrangement(name="DDP", world_size=size, make=_replicas) for size in (2, 4)),
    *(Arrangement(name="FSDP2", world_size=size, make=_sharded) for size in (2, 4)),
    *(
        Arrangement(name=f"ZeRO-{stage}", world_size=size, make=_deepspeed(stage))
        for stage in range(4)
        for size in (1, 2, 4)
    ),
    Arrangement(name="TP 2", world_size=2, make=_mesh(2, 1)),
    Arrangement(name="PP 2", world_size=2, make=_mesh(1, 2)),
    Arrangement(name="TP 2 x DP 2", world_size=4, make=_mesh(2, 1)),
    Arrangement(name="TP 2 x DP 2, ZeRO-1", world_size=4, make=_mesh(2, 1, True)),
    Arrangement(name="PP 2 x DP 2", world_size=4, make=_mesh(1, 2)),
    Arrangement(name="TP 2 x PP 2", world_size=4, make=_mesh(2, 2)),
)
"""All layouts, the reference first."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A layout beside one process.

    Fields:
        loss, norm: largest relative difference over the steps, of loss and gradient norm.
        equal_to_ddp: steps whose loss equals that of DDP on as many processes to the bit; None where there is none.
        repeats: whether a second run gave the same bits.
    """

    arrangement: str
    world_size: int
    model: str
    steps: int
    loss: float
    norm: float
    equal_to_ddp: int | None
    repeats: bool


def compare(
    models: Sequence[str], steps: int, chosen: Callable[[Arrangement], bool] = lambda arrangement: True
) -> Iterator[Comparison]:
    """Trains each model on each layout twice and yields how its course differs from that of one process."""
    by_kind: dict[str, list[float]] = {}
    norms: dict[str, list[float]] = {}
    replicas: dict[tuple[str, int], list[float]] = {}
    for place in ARRANGEMENTS:
        if place.name not in ("one process", "DDP") and not chosen(place):
            continue

        def courses(rank: int, make: MakeEngine = place.make) -> dict[str, Any]:
            return {kind: [vars(train(kind, make(), range(steps))) for _ in range(2)] for kind in models}

        for kind, (first, second) in fork(place.world_size, courses).items():
            losses = first["losses"]
            if place.name == "one process":
                by_kind[kind], norms[kind] = losses, first["norms"]
            if place.name == "DDP":
                replicas[kind, place.world_size] = losses
            beside = by_kind[kind] if place.world_size == 1 else replicas.get((kind, place.world_size))
            equal = None if beside is None else sum(a == b for a, b in zip(losses, beside, strict=True))
            yield Comparison(
                arrangement=place.name,
                world_size=place.world_size,
                model=kind,
                steps=steps,
                loss=deviation(losses, by_kind[kind]),
                norm=deviation(first["norms"], norms[kind]),
                equal_to_ddp=equal,
                repeats=first == second,
            )


def batches(config: ModelConfig, step: int, engine: Engine) -> list[Batch]:
    """Returns this process's part of the micro-batches of a step; the global batch depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    found = []
    share = GLOBAL_BATCH // engine.data_size
    for _ in range(MICRO_STEPS):
        tokens = torch.randint(1, VOCAB_SIZE, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (GLOBAL_BATCH, 1), generator=generator)
        segments = (torch.arange(LENGTH) < lengths).long()
        masked = torch.rand(GLOBAL_BATCH, LENGTH, generator=generator) < 0.2
        rows = slice(engine.data_rank, GLOBAL_BATCH, engine.data_size)
        source, following = tokens[rows, :-1], tokens[rows, 1:]
        real = segments[rows]
        labels = {"lm": following}
        if "mlm" in config.target:
            labels = {"mlm": source * masked[rows] * real, "sp": tokens[rows, 0] % 2}
        found.append(
            Batch(
                token_ids=source,
                segment_ids=real,
                labels=labels,
                decoder_token_ids=following.flip(1) if config.decoder else None,
                decoder_segment_ids=real if config.decoder else None,
                token_count=int(real.sum()),
            )
        )
        assert found[-1].size == share, f"{GLOBAL_BATCH} samples do not divide among {engine.data_size} processes"
    return found


def train(
    kind: str, engine: Engine, steps: Sequence[int], *, load: Path | None = None, save: Path | None = None
) -> Course:
    """Trains a model of MODELS over the given steps; a state of another layout may be its start and its end.

    Args:
        load: folder of an earlier `save`.
        save: folder to which the state goes after the last step.
    """
    config = MODELS[kind]
    model = engine.construct(lambda: build_model(config, VOCAB_SIZE, seed=1))
    if load is not None:
        _load_model(model, engine, load)
    settings = OptimConfig(learning_rate=1e-3, warmup=0.1)  # at 3e-3 a last bit grows to percents within 50 steps
    optimizer = engine.prepare(model, lambda prepared: build_optimizer(prepared, settings))
    if load is not None:
        engine.restore_optimizer(optimizer, _merged(load, "optimizer"))
    rate = build_schedule(settings, 200)
    model.train()
    course = Course()
    for step in steps:
        window = batches(config, step, engine)
        counts = engine.sum_over_ranks(count_labels(window, config))
        set_learning_rate(optimizer, rate(step))
        losses = engine.accumulate(model, [MicroStep(batch=batch, divisor=counts, seed=step) for batch in window])
        update = engine.update(optimizer, losses, max_norm=1.0)
        course.losses.append(
            sum(value.total / counts[name] for values in update.values for name, value in values.items())
        )
        course.norms.append(update.gradient_norm)
    if save is not None:
        snapshot = engine.snapshot(model, optimizer)
        if engine.rank == 0 and save.exists():
            shutil.rmtree(save)  # parts of an earlier, larger world would be read with these
        if dist.is_initialized():
            dist.barrier()
        save.mkdir(parents=True, exist_ok=True)
        for name, tensors in (("model", snapshot.model), ("optimizer", snapshot.optimizer)):
            save_file(_untied(tensors), str(save / f"{name}-{engine.rank}.safetensors"))
        if dist.is_initialized():
            dist.barrier()
    return course


def _untied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _merged(folder: Path, name: str) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for part in sorted(folder.glob(f"{name}-*.safetensors")):
        merged |= load_file(part)
    return merged


def _load_model(model: torch.nn.Module, engine: Engine, folder: Path) -> None:
    load_tensors(model, _merged(folder, "model"), source=str(folder), layout=engine.layout)


def deviation(ours: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the largest relative difference; infinite where the lengths differ or a number is none."""
    if len(ours) != len(reference) or not all(map(math.isfinite, ours)):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True))


def differences(first: Path, second: Path) -> Iterator[str]:
    """Yields the names of tensors in which two saved states differ in any bit."""
    for kind in ("model", "optimizer"):
        ours, theirs = _merged(first, kind), _merged(second, kind)
        for name in sorted({*ours, *theirs}):
            if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name]):
                yield f"{kind} {name}"
