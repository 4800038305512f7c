"""Taking up a run where it stopped: what must be equal, and how the state goes back into its owners."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tencentpretrain.checkpoint.layout import Layout
from tencentpretrain.checkpoint.loading import load_tensors
from tencentpretrain.checkpoint.training import TrainingState
from tencentpretrain.config.resume_classes import CHECKED_BY_CONTENT, HARMLESS
from tencentpretrain.errors import ConfigError, DataFormatError


def check_unchanged(
    path: Path, saved: Mapping[str, Any], current: Mapping[str, Any], allowed: Iterable[str]
) -> list[str]:
    """Compares the settings of a checkpoint with those of this start.

    Args:
        path: the checkpoint, for messages.
        saved, current: by published key.
        allowed: keys that the user lets differ.

    Returns:
        A sentence for each difference that is let through.

    Raises:
        ConfigError: settings that affect the numbers differ.
    """
    allowed = set(allowed)
    differences = {
        key: (saved.get(key), current.get(key))
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    }
    refused = [key for key in differences if key not in HARMLESS | CHECKED_BY_CONTENT | allowed]
    if refused:
        changes = "".join(f"\n  {key}: was {differences[key][0]!r}, is {differences[key][1]!r}" for key in refused)
        raise ConfigError(
            f"{path}: this run was started with other settings; use them again, let them change with "
            f"--allow_change {' '.join(refused)}, or start anew with --no-resume{changes}"
        )
    return [f"{key}: was {was!r}, is {now!r}" for key, (was, now) in differences.items()]


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
