"""Writes a Slurm batch file for a pre-training command: saved and queued again before the time limit."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tencentpretrain.entry.run import run_main
from tencentpretrain.errors import ConfigError, ResourceError

_EPILOG = """\
example:
  tencentpretrain slurm --nodes 2 --processes_per_node 8 --time 24:00:00 --output run.sbatch -- \\
      pretrain.py --dataset_path dataset.pt --vocab_path vocab.txt --output_model_path runs/lm.bin ...
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the batch file and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="slurm", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--processes_per_node", type=int, default=1, help="processes, each with a GPU (default 1)")
    parser.add_argument("--cpus_per_process", type=int, default=4, help="cores of each process (default 4)")
    parser.add_argument("--cpu", action="store_true", help="no GPUs")
    parser.add_argument("--time", default="24:00:00", help="limit of one job; it is queued again (default 24:00:00)")
    parser.add_argument("--save_seconds", type=int, default=300, help="for the last save before it (default 300)")
    parser.add_argument("--job_name", default="pretrain")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help='further, such as "--mem=0"')
    parser.add_argument(
        "--prologue", default="", help="shell commands before the run, such as activating an environment"
    )
    parser.add_argument("--output", type=Path, help="the batch file (default: standard output)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- pretrain.py --flag value ...")
    options = parser.parse_args(argv)
    return run_main(lambda: _write(options))


def _write(options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or not Path(command[0]).name.startswith("pretrain"):
        raise ConfigError("command: give the pre-training command after --, such as: -- pretrain.py --dataset_path ...")
    problems = [
        f"{name}: is {getattr(options, name)}, but must be at least 1"
        for name in ("nodes", "processes_per_node", "cpus_per_process", "save_seconds")
        if getattr(options, name) < 1
    ]
    flags = [flag.split("=")[0] for flag in command[1:]]
    problems += [
        f"{flag}: Slurm says which process is which; leave it out"
        for flag in ("--world_size", "--gpu_ranks", "--master_ip", "--local_rank")
        if flag in flags
    ]
    if problems:
        raise ConfigError(problems)
    _check(command[1:], options)
    text = batch_file(options, command)
    if options.output is None:
        sys.stdout.write(text)
        return 0
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{options.output}: cannot be written ({error.strerror})") from error
    print(f"wrote {options.output}; start it with: sbatch {options.output}", file=sys.stderr)
    return 0


def _check(flags: Sequence[str], options: argparse.Namespace) -> None:
    """Refuses here what the job would refuse after hours in the queue."""
    from tencentpretrain.config.run import load_run

    processes = {
        "WORLD_SIZE": options.nodes * options.processes_per_node,
        "LOCAL_WORLD_SIZE": options.processes_per_node,
    }
    as_in_the_job = {"RANK": 0, "LOCAL_RANK": 0, **processes}
    before = dict(os.environ)
    try:
        os.environ.update({name: str(value) for name, value in as_in_the_job.items()})
        load_run(flags)
    finally:
        for name in as_in_the_job:
            os.environ.pop(name)
        os.environ.update(before)


def batch_file(options: argparse.Namespace, command: Sequence[str]) -> str:
    """Returns the batch file."""
    program, *flags = command
    run = "python -m tencentpretrain pretrain" if program == "pretrain" else f"python {shlex.quote(program)}"
    lines = [f"{run} \\", *_wrapped(flags)]
    settings = [
        f"--job-name={options.job_name}",
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={options.processes_per_node}",
        f"--cpus-per-task={options.cpus_per_process}",
        *([] if options.cpu else [f"--gpus-per-node={options.processes_per_node}"]),
        f"--time={options.time}",
        *([f"--partition={options.partition}"] if options.partition else []),
        *([f"--account={options.account}"] if options.account else []),
        f"--signal=B:TERM@{options.save_seconds}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.txt",
        *options.sbatch,
    ]
    return _TEMPLATE.format(
        settings="\n".join(f"#SBATCH {setting}" for setting in settings),
        prologue=f"{options.prologue}\n" if options.prologue else "",
        threads=options.cpus_per_process,
        command="\n    ".join(lines),
    )


def _wrapped(flags: Sequence[str]) -> list[str]:
    """Returns a flag with its values per line."""
    lines: list[list[str]] = []
    for flag in flags:
        if flag.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(shlex.quote(flag))
    joined = ["    " + " ".join(line) for line in lines]
    return [line + (" \\" if number < len(joined) - 1 else " &") for number, line in enumerate(joined)]


_TEMPLATE = """\
#!/bin/bash
{settings}

# Slurm's variables tell each process its rank; all meet on the first node at a port that the job's number names.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS={threads}
{prologue}
# Before the time limit Slurm sends SIGTERM to this shell, which passes it on: all processes finish their step, save and
# exit with 143. The job is then queued again and continues exactly. The same command also continues after a node's end.
srun --kill-on-bad-exit=0 --wait=120 {command}
step=$!
stopped=
trap 'stopped=yes; kill -TERM $step' TERM
wait $step
while kill -0 $step 2>/dev/null; do
    wait $step
done
wait $step
code=$?
if [ -n "$stopped" ] && {{ [ $code -eq 143 ] || [ $code -eq 7 ]; }}; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""
