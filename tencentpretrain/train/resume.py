"""Taking up a run where it stopped: what must be equal, and how the state goes back into its owners."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tencentpretrain.checkpoint.layout import Layout
from tencentpretrain.checkpoint.loading import load_tensors
from tencentpretrain.checkpoint.training import TrainingState
from tencentpretrain.config.resume_classes import CHECKED_BY_CONTENT, HARMLESS, LAYOUT
from tencentpretrain.errors import ConfigError, DataFormatError


def check_unchanged(
    path: Path,
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    allowed: Iterable[str],
    data_sizes: tuple[int, int] = (1, 1),
) -> list[str]:
    """Compares the settings of a checkpoint with those of this start.

    Args:
        path: the checkpoint, for messages.
        saved, current: by published key.
        allowed: keys that the user lets differ.
        data_sizes: how many processes read shares of each batch, when it was saved and now.

    Returns:
        A sentence for each difference that is let through.

    Raises:
        ConfigError: settings that affect the numbers differ.
    """
    through = HARMLESS | CHECKED_BY_CONTENT | LAYOUT | set(allowed)
    was, now = (
        count * int(config.get("batch_size", 0)) for count, config in zip(data_sizes, (saved, current), strict=True)
    )
    if was == now:
        through |= {"batch_size"}
    elif data_sizes[0] != data_sizes[1] and "batch_size" not in through:
        raise ConfigError(_other_global_batch(path, was, now, data_sizes))
    differences = {
        key: (saved.get(key), current.get(key))
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    }
    refused = [key for key in differences if key not in through]
    if refused:
        changes = "".join(f"\n  {key}: was {differences[key][0]!r}, is {differences[key][1]!r}" for key in refused)
        raise ConfigError(
            f"{path}: this run was started with other settings; use them again, let them change with "
            f"--allow_change {' '.join(refused)}, or start anew with --no-resume{changes}"
        )
    return [f"{key}: was {before!r}, is {after!r}" for key, (before, after) in differences.items()]


def _other_global_batch(path: Path, was: int, now: int, data_sizes: tuple[int, int]) -> str:
    """Says how to keep the samples of a step on another number of processes."""
    keep = f"give --batch_size {was // data_sizes[1]} to keep that, or " if was % data_sizes[1] == 0 else ""
    return (
        f"{path}: a step of this run read {was} samples over {data_sizes[0]} processes, now it would read {now} over "
        f"{data_sizes[1]}; {keep}accept another course with --allow_change batch_size"
    )


def check_fingerprints(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses a run whose data or tokenizer has changed.

    Args:
        saved, current: name of a file -> its fingerprint.

    Raises:
        DataFormatError: a fingerprint differs.
    """
    for name, fingerprint in saved.items():
        if current.get(name) != fingerprint:
            raise DataFormatError(
                f"{name} has changed since {path} was saved (fingerprint {str(current.get(name))[:12]}, expected "
                f"{str(fingerprint)[:12]}); bring it back, or start anew with --no-resume"
            )


def restore_model(model: nn.Module, state: TrainingState, path: Path, layout: Layout) -> None:
    """Copies a checkpoint's weights into a model."""
    load_tensors(model, state.model, source=str(path), layout=layout)
