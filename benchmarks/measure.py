"""What all benchmarks share: pinned threads, alternating rounds, a table, a JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
)


def pin(threads: int) -> None:
    """Keeps this process on its first `threads` cores; call it before numpy or torch is imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)


def environment(threads: int, *packages: str) -> dict[str, Any]:
    """Returns what the figures depend on: processor, its instruction sets, threads, versions."""
    from importlib.metadata import version

    return {
        "processor": _processor(),
        "flags": [flag for flag in CPU_FLAGS if flag in _processor_flags()],
        "threads": threads,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def alternate(
    rounds: int,
    first: Callable[[], object],
    second: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Times two functions in turn, swapping who begins each round; returns the seconds of each, round by round.

    Args:
        clock: `time.process_time` counts this process's seconds on the processor, whatever else the machine does.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            began = clock()
            (first, second)[index]()
            seconds[index].append(clock() - began)
    return seconds


def spread(values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Returns median, lowest and highest of the rounds, and the rounds."""
    rounded = [round(value, digits) for value in values]
    median = round(statistics.median(values), digits)
    return {"median": median, "lowest": min(rounded), "highest": max(rounded), "rounds": rounded}


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows under their columns, text to the left and numbers to the right."""
    table = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(columns), *table]) for column in range(len(columns))]
    for number, line in enumerate([list(columns), *table]):
        numeric = [number > 0 and isinstance(value, (int, float)) for value in (rows[number - 1] if number else line)]
        print("  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip())  # fmt: skip


def write_results(name: str, results: Mapping[str, Any]) -> None:
    """Writes benchmarks/results/<name>.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, **results}, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path.relative_to(ROOT)}")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
