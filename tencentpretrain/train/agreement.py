"""What has to be equal on all processes of a run, and is compared before its first step."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tencentpretrain.config.resume_classes import CHECKED_BY_CONTENT

_OF_THE_PLACE = frozenset(
    {
        "config_path", "device", "dev_dataset_path", "global_rank", "gpu_ranks", "local_rank", "log_path",
        "num_workers", "threads",
    }
)  # fmt: skip
"""Settings that belong to one machine or process."""


def facts(config: Mapping[str, Any], fingerprints: Mapping[str, Any], processes: int) -> dict[str, dict[str, Any]]:
    """Returns what all processes of a run must have alike, by kind and key.

    Args:
        config: all settings by published key.
        fingerprints: of data and tokenizers.
        processes: how many this process believes there are.
    """
    of_place = _OF_THE_PLACE | CHECKED_BY_CONTENT
    return {
        "setting": {key: value for key, value in config.items() if key not in of_place},
        "content": dict(fingerprints),
        "software": {
            "python": ".".join(platform.python_version_tuple()[:2]),
            "torch": str(torch.__version__),
            "tencentpretrain": version("tencentpretrain"),
            "sources": source_hash(),
        },
        "run": {"processes": processes},
    }


@cache
def source_hash() -> str:
    """Returns what identifies the package's sources."""
    folder = Path(__file__).resolve().parents[1]
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
