"""What this machine has, asked without torch where that is possible."""

from __future__ import annotations

import importlib.util
from pathlib import Path

MIB = 1 << 20
_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def framework_bytes(*, other_device: bool = False) -> int:
    """Returns what a training process of the package holds besides its model: interpreter, torch and its libraries.

    860 MiB is the measured peak of a run whose model has nearly no weights, with a torch built for CUDA, whose
    libraries are loaded on a CPU too (they take about 260 MiB). On the GPU itself a context takes about 500 MiB.
    """
    if other_device:
        return 500 * MIB
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent / "lib" if spec is not None and spec.origin else Path()
    return (860 if (folder / "libtorch_cuda.so").exists() else 600) * MIB


def has_gpu() -> bool:
    """Tells whether there may be a GPU; asking torch itself takes a second."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def host_memory() -> int | None:
    """Returns the bytes of memory that can still be had, within the limit of the container; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    found += [room for room in (_room_in_group(),) if room is not None]
    return min(found) if found else None


def _room_in_group() -> int | None:
    """Returns what the control group (version 2 or 1) leaves; memory of files that can be dropped counts as free."""
    for limit, used, statistics in (
        (_CGROUP / "memory.max", _CGROUP / "memory.current", _CGROUP / "memory.stat"),
        (
            _CGROUP / "memory" / "memory.limit_in_bytes",
            _CGROUP / "memory" / "memory.usage_in_bytes",
            _CGROUP / "memory" / "memory.stat",
        ),
    ):
        try:
            most, now = int(limit.read_text(encoding="ascii")), int(used.read_text(encoding="ascii"))
            lines = dict(line.split() for line in statistics.read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):  # no such group, or its limit is the word "max"
            continue
        if most < _UNLIMITED:
            reclaimable = int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))
            return max(most - now + reclaimable, 0)
    return None


def device_memory(index: int = 0) -> int | None:
    """Returns the free bytes of a GPU, or None if torch finds none."""
    import torch

    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    return int(torch.cuda.mem_get_info(index)[0])
