"""Joining the other processes of a run: where they meet, who is missing, and what this process may use."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from tencentpretrain.config.launcher import Place
from tencentpretrain.errors import ConfigError, PeerError, ResourceError

_COLLECTIVES_WAIT = timedelta(days=7)
"""Sums wait as long as it takes: `train.peers` knows who works and who hangs, a time limit here does not."""


@contextmanager
def joined(place: Place, *, backend: str, seconds: int) -> Iterator[None]:
    """Meets the other processes of a run, and leaves them at the end.

    Args:
        backend: nccl or gloo.
        seconds: how long to wait for all of them.

    Raises:
        ConfigError: the address has no host, or a rank is there twice.
        ResourceError: the port is in use.
        PeerError: a process is missing; it is named.
    """
    deadline = time.monotonic() + seconds
    store = _meet(place, seconds)
    store = _call_roll(place, PrefixStore("pretraining", store), deadline, seconds)
    alarm = threading.Timer(seconds, _give_up, (place, seconds))
    alarm.daemon = True
    alarm.start()
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.world_size, timeout=_COLLECTIVES_WAIT
    )
    alarm.cancel()
    yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that have gone


def local_device(name: str, place: Place) -> str:
    """Returns the device of this process: each process of a machine has a GPU of its own.

    Raises:
        ConfigError: one GPU is named for several processes.
        ResourceError: the machine has fewer GPUs than processes.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if ":" in name:
        if place.local_world_size > 1:
            raise ConfigError(f"device: {name} is one GPU, but {place.local_world_size} processes run here; use cuda")
        return name
    count = torch.cuda.device_count()
    bound = "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")  # the launcher shows each process its own
    if count < place.local_world_size and not (count == 1 and bound):
        raise ResourceError(
            f"{place.local_world_size} processes on {socket.gethostname()}, but it has {count or 'no'} GPU"
            f"{'s' if count != 1 else ''}; start one process per GPU, or use --device cpu"
        )
    return "cuda:0" if count == 1 else f"cuda:{place.local_rank}"


def local_threads(place: Place) -> int | None:
    """Returns this process's share of the machine's cores, or None where OMP_NUM_THREADS decides."""
    given = os.environ.get("OMP_NUM_THREADS")
    if given and not (given == "1" and place.launcher == "torchrun"):  # torchrun sets 1 where nothing is set
        return None
    return max(1, len(os.sched_getaffinity(0)) // place.local_world_size)


def _meet(place: Place, seconds: int) -> Store:
    try:
        socket.getaddrinfo(place.address, place.port)
    except OSError as error:
        raise ConfigError(
            f"the processes cannot meet at {place.address}:{place.port}: this host name has no address "
            f"({error.strerror}); give the address of rank 0 as MASTER_ADDR or --master_ip"
        ) from None
    listens = place.rank == 0 and not place.served
    try:
        return TCPStore(
            place.address, place.port, is_master=listens, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )
    except (dist.DistError, RuntimeError) as error:
        if listens:
            raise ResourceError(
                f"port {place.port} on {socket.gethostname()} is in use or not allowed, so rank 0 cannot listen there; "
                f"choose another MASTER_PORT or --master_ip ({str(error).splitlines()[0]})"
            ) from None
        raise PeerError(
            f"rank {place.rank} on {socket.gethostname()}: no answer at {place.address}:{place.port} within {seconds} "
            "seconds; rank 0 is missing there, or a firewall is between"
        ) from None


def _call_roll(place: Place, store: Store, deadline: float, seconds: int) -> Store:
    """Waits until every rank is there once and returns a store of these processes alone.

    The leader looks who is there, and its word goes to all. A launcher's store may still hold what was said before all
    were started again, so everything is said under the name that the leader gives itself, and counts for a process
    only if it names that process.
    """
    name = secrets.token_hex(8)
    line = f"{place.rank} {place.world_size} {socket.gethostname()} {name}\n"
    try:
        leader = name if place.rank == 0 else ""
        if place.rank == 0:
            _append(store, f"present/{leader}", line)
            store.set("leader", leader)
            problem, names = _absence(place, store, f"present/{leader}", deadline, seconds)
            store.set(f"verdict/{leader}", json.dumps([problem, names]))
        else:
            names = []
            while name not in names:
                store.wait(["leader"], timedelta(seconds=max(deadline - time.monotonic(), 0) + 2))
                if (now := store.get("leader").decode()) != leader:
                    leader = now
                    _append(store, f"present/{leader}", line)
                if store.check([f"verdict/{leader}"]):
                    problem, names = json.loads(store.get(f"verdict/{leader}"))
                elif time.monotonic() > deadline + 2:
                    raise dist.DistStoreError("no verdict")
                if name not in names:
                    time.sleep(0.05)
    except (dist.DistError, RuntimeError):
        raise PeerError(
            f"rank {place.rank} on {socket.gethostname()}: rank 0 at {place.address}:{place.port} did not call the "
            f"processes within {seconds} seconds, or has ended"
        ) from None
    if problem:
        if place.rank == 0 and not place.served:
            time.sleep(0.5)  # so that the others read it before the store ends with this process
        raise PeerError(problem)
    return PrefixStore(f"run/{leader}", store)


def _append(store: Store, key: str, line: str) -> None:
    store.append(key, line)  # type: ignore[attr-defined]


def _absence(place: Place, store: Store, key: str, deadline: float, seconds: int) -> tuple[str, list[str]]:
    """Returns what keeps the processes from starting (nothing if all are there), and the names of those there."""
    while True:
        lines = [line.split() for line in store.get(key).decode().splitlines()]
        names = [name for _, _, _, name in lines]
        hosts: dict[int, str] = {}
        for rank, size, host, _ in lines:
            if int(size) != place.world_size:
                return (
                    f"the processes disagree on their number: rank 0 on {socket.gethostname()} was started as one of "
                    f"{place.world_size}, rank {rank} on {host} as one of {size}"
                ), names
            if int(rank) in hosts:
                return f"two processes have rank {rank}, on {hosts[int(rank)]} and on {host}; start each once", names
            hosts[int(rank)] = host
        if len(hosts) == place.world_size:
            return "", names
        if time.monotonic() > deadline:
            there = ", ".join(sorted(set(hosts.values())))
            missing = [rank for rank in range(place.world_size) if rank not in hosts]
            shown = ", ".join(map(str, missing[:16])) + (" ..." if len(missing) > 16 else "")
            return (
                f"rank{'s' if len(missing) > 1 else ''} {shown} of {place.world_size} did not come to "
                f"{place.address}:{place.port} within {seconds} seconds (there: {there}); "
                "start the same command on every machine, or wait longer with --join_timeout"
            ), names
        time.sleep(0.05)


def _give_up(place: Place, seconds: int) -> None:
    print(
        f"error: rank {place.rank} on {socket.gethostname()}: the processes met at {place.address}:{place.port}, but "
        f"could not connect to each other within {seconds} seconds; look at GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME",
        file=sys.stderr,
        flush=True,
    )
    os._exit(PeerError.exit_code)
