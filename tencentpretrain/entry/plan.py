"""`tencentpretrain plan`: what a run will take, and what would fit, before anything is started."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tencentpretrain.config.run import load_run
from tencentpretrain.entry.run import run_main
from tencentpretrain.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from tencentpretrain.config.run import RunConfig
    from tencentpretrain.plan.advice import Proposal, Room
    from tencentpretrain.plan.run import Plan

_USAGE = """usage: tencentpretrain plan [--world_size N] [--memory_gb G] [--vocab_size V] [flags of pretrain.py]

Says what pretrain.py would take with these flags: parameters, memory of each process, operations per token, size of a
checkpoint; and, where that does not fit, settings with the same samples per update that do.
  --world_size N          processes in all
  --processes_here N      of them on this machine (default: all, at most one per GPU)
  --memory_gb G           memory of the device in GiB (default: what is free here)
  --vocab_size V          instead of a vocabulary file
  --deepspeed_config F    plans with DeepSpeed
  --json                  for a script
The exit code is 5 where the run does not fit.

example: tencentpretrain plan --config_path models/llama/7b_config.json --vocab_size 32000 --batch_size 4 \\
             --seq_length 2048 --bf16 --device cuda --world_size 8 --deepspeed_config models/deepspeed_zero3_config.json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan; returns the exit code."""
    return run_main(lambda: _plan(list(sys.argv[1:] if argv is None else argv)))


def _plan(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(_USAGE, end="")
        return 0
    parser = argparse.ArgumentParser(prog="plan", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--world_size", type=int, default=1)
    parser.add_argument("--processes_here", type=int)
    parser.add_argument("--memory_gb", type=float)
    parser.add_argument("--vocab_size", type=int)
    parser.add_argument("--json", action="store_true")
    try:
        own, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None
    for name in ("world_size", "processes_here", "memory_gb", "vocab_size"):
        if getattr(own, name) is not None and getattr(own, name) <= 0:
            raise ConfigError(f"{name}: is {getattr(own, name):g}, but must be greater than 0")
    run = load_run(_completed(rest, own.world_size, own.vocab_size), prog="plan")

    from tencentpretrain.plan.advice import fits, planner, proposals
    from tencentpretrain.plan.run import as_json
    from tencentpretrain.plan.sharding import sharding_of

    on_gpu = _on_gpu(run)
    sharding = sharding_of(run, world_size=own.world_size, other_device=on_gpu)
    vocab_size, tgt_vocab_size = _vocabularies(run, own.vocab_size)
    make = planner(vocab_size, tgt_vocab_size)
    plan = make(run, sharding)
    room = _room(run, own.memory_gb, on_gpu=on_gpu, processes=own.processes_here or own.world_size)
    fitting = room is None or fits(plan, room)
    found = [] if room is None or fitting else proposals(run, sharding, make, room)
    if own.json:
        values = as_json(plan)
        values["available_bytes"] = None if room is None else room.device
        values["fits"] = None if room is None else fitting
        values["proposals"] = [
            {"flags": dict(proposal.flags), **as_json(proposal.plan)["memory_per_process"]} for proposal in found
        ]
        print(json.dumps(values, indent=1))
    else:
        _print(plan, room, found)
    return 0 if fitting else ResourceError.exit_code


def _completed(argv: Sequence[str], world_size: int, vocab_size: int | None) -> list[str]:
    """Returns the flags with what only a real run must be given."""
    words = {token.partition("=")[0] for token in argv}
    flags = list(argv)
    if "--output_model_path" not in words:
        flags += ["--output_model_path", "plan"]
    if vocab_size is not None:
        flags += ["--tokenizer", "space", "--vocab_path", "given by --vocab_size"]
    if "--deepspeed_config" in words and "--deepspeed" not in words:
        flags += ["--deepspeed"]
    if world_size > 1:
        flags += ["--world_size", str(world_size), "--gpu_ranks", *map(str, range(world_size))]
    return flags


def _vocabularies(run: RunConfig, vocab_size: int | None) -> tuple[int, int | None]:
    if vocab_size is not None:
        return vocab_size, None
    from tencentpretrain.tokenizers import build_tokenizer

    tgt = build_tokenizer(run.tgt_tokenizer).vocab_size if run.tgt_tokenizer else None
    return build_tokenizer(run.tokenizer).vocab_size, tgt


def _on_gpu(run: RunConfig) -> bool:
    from tencentpretrain.plan.machine import device_memory, has_gpu

    if run.precision.device == "auto":
        return has_gpu() and device_memory() is not None
    return run.precision.device.startswith("cuda")


def _room(run: RunConfig, memory_gb: float | None, *, on_gpu: bool, processes: int) -> Room | None:
    from tencentpretrain.plan.advice import GIB, Room
    from tencentpretrain.plan.machine import device_memory, has_gpu, host_memory

    if memory_gb is not None:
        size: int | None = int(memory_gb * GIB)
    elif on_gpu:
        size = device_memory(int(run.precision.device.partition(":")[2] or 0)) if has_gpu() else None
    else:
        size = host_memory()
    return None if size is None else Room(device=size, processes=1 if on_gpu else processes)


def _print(plan: Plan, room: Room | None, found: Sequence[Proposal]) -> None:
    from tencentpretrain.plan.advice import fits, gigabytes, needed

    peak = plan.memory.device
    rows = [("parameters", f"{plan.parameters['total']:,}")]
    rows += [(f"  {name}", f"{count:,}") for name, count in plan.parameters.items() if name != "total"]
    rows.append(("memory of a process", f"{gigabytes(peak.total)}  (largest at: {peak.name})"))
    rows += [(f"  {name}", gigabytes(size)) for name, size in peak.parts.items() if size]
    host = {**plan.memory.host, "loader": plan.loader}
    rows += [(f"  in the host's memory: {name}", gigabytes(size)) for name, size in host.items() if size]
    rows.append(("operations per token", f"{plan.flops.training / 1e9:.3g} GFLOP to train"))
    rows.append(("  forward", f"{plan.flops.forward / 1e9:.3g} GFLOP (attention {plan.flops.attention / 1e9:.3g})"))
    rows.append(("checkpoint on disk", gigabytes(sum(plan.checkpoint.values()))))
    rows += [(f"  {name}", gigabytes(size)) for name, size in plan.checkpoint.items()]
    rows.append(("samples per update", f"{plan.global_batch:,}"))
    if room is not None:
        each = f" for {room.processes} processes" if room.processes > 1 else ""
        rows.append(("memory that is free", gigabytes(room.device) + each))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    if room is None:
        print("how much memory the device has is not known here; give --memory_gb")
    elif fits(plan, room):
        print("it fits")
    elif found:
        print("it does not fit; with the same samples per update these do:")
        for proposal in found:
            print(f"  {proposal.text}  ({gigabytes(needed(proposal.plan))} per process)")
    else:
        print("it does not fit, nor does any smaller micro-batch with recomputation and bf16")
