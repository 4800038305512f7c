"""`<output_model_path>.run/`: all that a run writes beside its weights, owned by one process at a time."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tencentpretrain import faults
from tencentpretrain.checkpoint.training import CheckpointFolder
from tencentpretrain.data.durable import storage_errors, to_json, write_durably
from tencentpretrain.errors import ResourceError
from tencentpretrain.train.metrics import MetricsFile

logger = logging.getLogger(__name__)

_LEVELS = {"ERROR": logging.ERROR, "INFO": logging.INFO, "DEBUG": logging.DEBUG, "NOTSET": logging.NOTSET}
_LINE = "[%(asctime)s %(levelname)s] %(message)s"


class RunFolder:
    """The folder of a run: config.json, env.json, metrics.jsonl, log.txt, loss.png, checkpoints/.

    Within its `with` block no other process can use the folder. The lock is the operating system's, so it is gone with
    the process that held it, however that ended.

    Args:
        output_model_path: prefix of the run's files.
        keep: how many checkpoints stay; 0 keeps all.
        rank, world_size: of this process among all that save.
    """

    def __init__(self, output_model_path: str, keep: int = 0, *, rank: int = 0, world_size: int = 1) -> None:
        self.output = Path(output_model_path)
        self.path = self.output.with_name(f"{self.output.name}.run")
        self.checkpoints = CheckpointFolder(self.path / "checkpoints", keep, rank=rank, world_size=world_size)
        self.metrics = MetricsFile(self.path / "metrics.jsonl")
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        try:
            with storage_errors(self.path, 0):
                self.path.mkdir(parents=True, exist_ok=True)
                self._take_lock()
        except OSError as error:
            raise ResourceError(
                f"{self.path}: this folder of the run cannot be made ({error.strerror}); choose another "
                "--output_model_path"
            ) from error
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            faults.reach("lock.clear", self.path / "lock")
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def weights_path(self, step: int) -> Path:
        """Returns where the published weights of a step are."""
        return self.output.with_name(f"{self.output.name}-{step}")

    def start_anew(self) -> None:
        """Sets an earlier run's checkpoints and metrics aside, under `earlier/`, where nothing is overwritten."""
        entries = [entry for entry in self.path.iterdir() if entry.name not in ("lock", "earlier")]
        if not (self.checkpoints.steps() or self.metrics.records()):
            return
        number = 1
        while (place := self.path / "earlier" / str(number)).exists():
            number += 1
        with storage_errors(place, 0):
            faults.reach("earlier.make", place)
            place.mkdir(parents=True)
            for entry in entries:
                faults.reach("earlier.rename", entry)
                entry.rename(place / entry.name)
        logger.info("files of the earlier run were moved to %s", place)

    def describe(self, config: Mapping[str, Any], command: list[str]) -> None:
        """Writes config.json and env.json."""
        with storage_errors(self.path, 4096):
            write_durably(self.path / "config.json", to_json(dict(config)))
            write_durably(self.path / "env.json", to_json(environment(command)))

    def _take_lock(self) -> None:
        path = self.path / "lock"
        faults.reach("lock.open", path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # A record lock: unlike flock, it is not inherited by loader processes that outlive a killed run.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace")
            os.close(descriptor)
            raise ResourceError(f"{self.path} is in use by another run ({_describe_holder(holder)})") from None
        stale = os.pread(descriptor, 4096, 0).decode(errors="replace")
        if stale:
            logger.info("taking over %s from a run that ended without leave (%s)", self.path, _describe_holder(stale))
        holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": _now()})
        faults.reach("lock.write", path)
        os.ftruncate(descriptor, 0)
        faults.reach("lock.note", path)
        os.pwrite(descriptor, holder.encode(), 0)
        self._lock = descriptor


class _LogFile(logging.FileHandler):
    """A log whose lines are not lost in silence."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            faults.reach("log.write", self.baseFilename)
        except OSError:
            self.handleError(record)
        else:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # overrides logging's name
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            with storage_errors(Path(self.baseFilename), 0):
                raise error
        super().handleError(record)


def configure_logging(
    log_path: Path,
    *,
    level: str,
    file_level: str,
    extra_path: str | None = None,
    console: logging.Handler | None = None,
    rank: int = 0,
) -> logging.Logger:
    """Sends the package's messages to the console (stderr) and to the run's log, and to a further file if given.

    Of ranks other than 0 the console shows warnings and errors only, with the rank.
    """
    package = logging.getLogger("tencentpretrain")
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
    package.setLevel(logging.DEBUG)
    package.propagate = False
    streams = [(console or logging.StreamHandler(sys.stderr), max(_LEVELS[level], logging.WARNING if rank else 0))]
    for path in [log_path, *([Path(extra_path)] if extra_path else [])]:
        with storage_errors(path, 0):
            path.parent.mkdir(parents=True, exist_ok=True)
            streams.append((_LogFile(path, encoding="utf-8"), _LEVELS[file_level]))
    line = _LINE if rank == 0 else _LINE.replace("] ", f"] [rank {rank}] ")
    for handler, number in streams:
        handler.setLevel(number)
        handler.setFormatter(logging.Formatter(line))
        package.addHandler(handler)
    return package


def environment(command: list[str]) -> dict[str, Any]:
    """Returns versions, machine and command line; no environment variables, which may hold secrets."""
    return {
        "command": command,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "commit": _commit(),
        "started": _now(),
    }


def _commit() -> str | None:
    """The commit of the package's own source tree, if it is one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        shown = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.strip()


def _describe_holder(content: str) -> str:
    try:
        holder = json.loads(content)
        return f"host {holder['host']}, process {holder['pid']}, started {holder['start']}"
    except (ValueError, KeyError, TypeError):
        return "its lock file is not readable"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
