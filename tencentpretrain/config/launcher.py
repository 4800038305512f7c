"""What a launcher says in the environment: which process of the run this is, and where the processes meet."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from tencentpretrain.errors import ConfigError

_SLURM_PORTS = (15000, 20000)
"""First port and how many: a Slurm job takes the one that its number names."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among those of a run.

    Fields:
        rank, world_size: of all processes.
        local_rank, local_world_size: of the processes on this machine.
        address, port: where all processes meet; rank 0, or its launcher, listens there.
        launcher: who started it, for messages.
        served: the launcher itself listens at the address.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    launcher: str
    served: bool = False


def read_place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Returns the place that a launcher gave this process, or None where no launcher started it.

    torchrun, the DeepSpeed launcher and this package's own set RANK and its companions; without them the variables of a
    Slurm step count.

    Raises:
        ConfigError: the variables are incomplete or contradict each other.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _checked(_from_ranks(environ))
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        place = _from_slurm(environ)
        return _checked(place) if place.world_size > 1 else None
    return None


def parse_address(address: str) -> tuple[str, int]:
    """Returns host and port of "tcp://host:port".

    Raises:
        ConfigError: it has another form.
    """
    try:
        parts = urlsplit(address if "//" in address else f"tcp://{address}")
        if parts.scheme == "tcp" and parts.hostname and parts.port and not parts.path.strip("/"):
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise ConfigError(f"master_ip: is {address!r}, but must be tcp://<host>:<port>, such as tcp://10.0.0.1:12345")


def _from_ranks(environ: Mapping[str, str]) -> Place:
    world_size = _integer(environ, "WORLD_SIZE")
    local_world_size = _integer(environ, "LOCAL_WORLD_SIZE", _integer(environ, "LOCAL_SIZE", 0))
    if "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    else:
        launcher = environ.get("TENCENTPRETRAIN_LAUNCHER", "the launcher")
    return Place(
        rank=_integer(environ, "RANK"),
        world_size=world_size,
        local_rank=_integer(environ, "LOCAL_RANK", 0 if world_size == 1 else None),
        local_world_size=local_world_size or world_size,
        address=environ.get("MASTER_ADDR", "localhost"),
        port=_integer(environ, "MASTER_PORT", 12345),
        launcher=launcher,
        served=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _from_slurm(environ: Mapping[str, str]) -> Place:
    world_size = _integer(environ, "SLURM_STEP_NUM_TASKS", _integer(environ, "SLURM_NTASKS", 1))
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "localhost"))
    tasks = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
    node = _integer(environ, "SLURM_NODEID", 0)
    first, count = _SLURM_PORTS
    return Place(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=tasks[node] if node < len(tasks) else world_size,
        address=environ.get("MASTER_ADDR", first_host(nodes)),
        port=_integer(environ, "MASTER_PORT", first + _integer(environ, "SLURM_JOB_ID", 0) % count),
        launcher="Slurm",
    )


def first_host(nodes: str) -> str:
    """Returns the first host of a Slurm list such as "gpu[003-006,9],login1"."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes


def _tasks_per_node(text: str) -> list[int]:
    """Returns the counts of a Slurm list such as "2(x3),1"."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _checked(place: Place) -> Place:
    problems = []
    if place.world_size < 1 or not 0 <= place.rank < place.world_size:
        problems.append(f"RANK: is {place.rank}, but with WORLD_SIZE {place.world_size} must be 0 to WORLD_SIZE - 1")
    if not 0 <= place.local_rank < place.local_world_size:
        problems.append(
            f"LOCAL_RANK: is {place.local_rank}, but with LOCAL_WORLD_SIZE {place.local_world_size} must be less"
        )
    if place.local_world_size > place.world_size:
        problems.append(f"LOCAL_WORLD_SIZE: is {place.local_world_size}, more than WORLD_SIZE {place.world_size}")
    if not 0 < place.port < 2**16:
        problems.append(f"MASTER_PORT: is {place.port}, but must be 1 to 65535")
    if problems:
        raise ConfigError(problems, source=f"variables set by {place.launcher}")
    return place


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise ConfigError(
                f"{name}: is not set, though RANK or SLURM_PROCID is; start with torchrun, which sets all"
            )
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}: is {text!r} in the environment, but must be a number") from None
