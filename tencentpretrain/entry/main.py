"""The console command `tencentpretrain`: finds a sub-command and imports it alone."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType

from tencentpretrain.entry.run import run_main
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import TASKS, nearest

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "preprocess": ("preprocess", "turn a corpus into a data set"),
        "pretrain": ("pretrain", "pre-train a model"),
        "plan": ("plan", "say what a run takes in memory, and what would fit"),
        "slurm": ("slurm", "write a Slurm batch file for a pre-training command"),
        "finetune": ("finetune", "fine-tune on a task: finetune classifier ..."),
        "infer": ("infer", "predict with a fine-tuned model: infer classifier ..."),
        "generate-lm": ("generate_lm", "continue texts with a decoder-only model"),
        "consolidate": ("consolidate", "join a checkpoint in many files into one"),
        "build-vocab": ("build_vocab", "train a vocabulary"),
        "explain-config": ("explain_config", "show each setting of a run, where it comes from and who owns it"),
        "list": ("list", "list the components of each registry"),
        "check-parity": ("check_parity", "check this installation against recorded numbers"),
        "reliability": ("reliability", "inject faults, and print what was promised and what was reached"),
        "demo": ("demo", "the whole line on text that every machine has"),
    }
)
"""Sub-command -> (module of `entry`, what it does)."""

TASK_COMMANDS = frozenset({"finetune", "infer"})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_main(lambda: _dispatch(arguments), debug="--debug" in arguments)


def available() -> dict[str, tuple[str, str]]:
    """Returns the sub-commands whose module is there."""
    return {
        name: command
        for name, command in COMMANDS.items()
        if importlib.util.find_spec(f"tencentpretrain.entry.{command[0]}") is not None
    }


def _dispatch(argv: list[str]) -> int:
    commands = available()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help(commands), end="")
        return 0 if argv else ConfigError.exit_code
    if argv[0] in ("--version", "version"):
        from importlib.metadata import version

        print(f"tencentpretrain {version('tencentpretrain')}")
        return 0
    name = argv[0].replace("_", "-")
    if name not in commands:
        raise ConfigError(f"unknown command {argv[0]!r}{nearest(name, commands) or '; --help lists all commands'}")
    module = importlib.import_module(f"tencentpretrain.entry.{commands[name][0]}")
    if name in TASK_COMMANDS:
        return _run_task(name, module, argv[1:])
    return module.main(argv[1:]) or 0


def _run_task(command: str, module: ModuleType, argv: list[str]) -> int:
    """Runs `finetune` or `infer`, whose first word is the task."""
    if not argv or argv[0].startswith("-"):
        print(f"usage: tencentpretrain {command} <{'|'.join(TASKS.names())}> [--flag value ...]")
        return 0 if {"-h", "--help"} & {*argv} else ConfigError.exit_code
    return module.main(TASKS.canonical(argv[0]), argv[1:]) or 0


def _help(commands: Mapping[str, tuple[str, str]]) -> str:
    lines = ["usage: tencentpretrain <command> [--flag value ...]", "", "commands:"]
    lines += [f"  {name:<16} {text}" for name, (_, text) in commands.items()]
    lines += ["", "tencentpretrain <command> --help lists the flags of a command."]
    return "\n".join(lines) + "\n"
