"""Settings that fit into memory, and the sentence of a run that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from tencentpretrain.config.run import RunConfig
from tencentpretrain.errors import ResourceError
from tencentpretrain.plan.run import HEAP_GAPS, Plan, plan_run
from tencentpretrain.plan.sharding import Sharding

GIB = 1 << 30
WANTED = 3
CERTAIN = 0.85
"""A run is refused only if this share of what it is predicted to need is more than there is."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What there is.

    Fields:
        device: bytes for the processes of this machine together (a GPU: for one process).
        processes: of this machine that share it.
    """

    device: int
    processes: int = 1


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Other settings with the same samples per update.

    Fields:
        flags: by flag of `pretrain.py`, or by key of the DeepSpeed JSON.
        plan: with them.
    """

    flags: Mapping[str, str]
    plan: Plan

    @property
    def text(self) -> str:
        return " ".join(f"{name} {value}".strip() for name, value in self.flags.items())


Planner = Callable[[RunConfig, Sharding], Plan]


def planner(vocab_size: int, tgt_vocab_size: int | None) -> Planner:
    """Returns a function that plans variants of a run."""
    return lambda run, sharding: plan_run(run, vocab_size, tgt_vocab_size=tgt_vocab_size, sharding=sharding)


def needed(plan: Plan) -> float:
    """Returns the bytes of one process on the device that computes."""
    on_cpu = not plan.training.sharding.other_device
    return plan.memory.device.total + (plan.loader if on_cpu else 0)


def fits(plan: Plan, room: Room) -> bool:
    """Tells whether the predicted need is there."""
    return needed(plan) * room.processes <= room.device


def proposals(run: RunConfig, sharding: Sharding, plan: Planner, room: Room) -> list[Proposal]:
    """Returns the first settings that fit, those that change least first."""
    found: list[Proposal] = []
    for cut_flags, cut, again, half in _families(run, sharding):
        for batch in _divisors(run.data.batch_size):
            flags, changed = _changed(run, batch=batch, again=again, half=half)
            if flags or cut_flags:
                variant = plan(changed, cut)
                if fits(variant, room):
                    found.append(Proposal(flags={**cut_flags, **flags}, plan=variant))
                    break
        if len(found) == WANTED:
            break
    return found


def _families(run: RunConfig, sharding: Sharding) -> Iterator[tuple[dict[str, str], Sharding, bool, bool]]:
    """Yields changes besides the micro-batch, the mildest first: spreading, recomputation, bf16."""
    recompute = (False,) if run.precision.gradient_checkpointing else (False, True)
    halves = (False,) if run.precision.bf16 or run.precision.fp16 else (False, True)
    for cut_flags, cut in _cuts(sharding):
        for half in halves:
            for again in recompute:
                yield cut_flags, cut, again, half


def _changed(run: RunConfig, *, batch: int, again: bool, half: bool) -> tuple[dict[str, str], RunConfig]:
    flags: dict[str, str] = {}
    precision: dict[str, bool] = {}
    if batch != run.data.batch_size:
        steps = run.train.accumulation_steps * (run.data.batch_size // batch)
        flags |= {"--batch_size": str(batch), "--accumulation_steps": str(steps)}
        run = replace(
            run,
            data=run.data.model_copy(update={"batch_size": batch}),
            train=run.train.model_copy(update={"accumulation_steps": steps}),
        )
    if again:
        flags["--gradient_checkpointing"] = ""
        precision["gradient_checkpointing"] = True
    if half:
        flags["--bf16"] = ""
        precision["bf16"] = True
    return flags, replace(run, precision=run.precision.model_copy(update=precision)) if precision else run


def _divisors(batch: int) -> list[int]:
    return [size for size in range(batch, 0, -1) if batch % size == 0]


def _cuts(sharding: Sharding) -> Iterator[tuple[dict[str, str], Sharding]]:
    """Yields stronger ways to spread or move the state."""
    yield {}, sharding
    most = 1 if sharding.model_size > 1 else 3
    for stage in range(sharding.stage + 1, most + 1):
        if sharding.data_size > 1:
            yield {"--deepspeed with ZeRO stage": str(stage)}, replace(sharding, stage=stage, deepspeed=True)
    if sharding.other_device and not sharding.offload_optimizer and sharding.model_size == 1:
        stage = max(sharding.stage, 2)
        moved = replace(sharding, stage=stage, deepspeed=True, offload_optimizer=True)
        yield {f"--deepspeed with ZeRO stage {stage} and offload_optimizer": ""}, moved
        both = replace(moved, stage=3, offload_weights=True)
        yield {"--deepspeed with ZeRO stage 3, offload_optimizer and offload_param": ""}, both


def gigabytes(size: float) -> str:
    """Returns bytes in GiB, as text."""
    return f"{size / GIB:.1f} GiB"


def require_room(run: RunConfig, sharding: Sharding, plan: Planner, room: Room, where: str) -> None:
    """Refuses a run that cannot fit; one that might is let through.

    Args:
        where: what has the room, for the message.

    Raises:
        ResourceError: it names the need, the room and settings that would fit.
    """
    first = plan(run, sharding)
    certain = _certain(first) * room.processes
    if certain <= room.device:
        return
    each = f" for {room.processes} processes" if room.processes > 1 else ""
    lines = [
        f"memory: this run needs about {gigabytes(needed(first) * room.processes)}{each} ({_largest(first)}), "
        f"but {where} has {gigabytes(room.device)} free"
    ]
    found = proposals(run, sharding, plan, room)
    if found:
        lines.append("the same samples per update fit with:")
        for proposal in found:
            lines.append(f"  {proposal.text}  (about {gigabytes(needed(proposal.plan) * room.processes)})")
    else:
        lines.append("no smaller micro-batch, recomputation or bf16 makes it fit; take a smaller model or more memory")
    lines.append("--no-plan_check starts it all the same")
    raise ResourceError("\n".join(lines))


def _certain(plan: Plan) -> float:
    """Returns what a process takes at least: its framework is loaded already; copies and gaps need not come on top."""
    doubtful = ("framework", "checkpoint copies", HEAP_GAPS)
    return CERTAIN * max(
        sum(size for name, size in moment.parts.items() if name not in doubtful) for moment in plan.memory.moments
    )


def _largest(plan: Plan) -> str:
    parts = sorted(plan.memory.device.parts.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in parts if size)
