"""Taking up a run where it stopped: what must be equal, and how the state goes back into its owners."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tencentpretrain.checkpoint.loading import load_tensors
from tencentpretrain.checkpoint.training import TrainingState
from tencentpretrain.config.resume_classes import CHECKED_BY_CONTENT, HARMLESS
from tencentpretrain.errors import CheckpointMismatch, ConfigError, DataFormatError


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


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns an optimizer's state as tensors named "<parameter>/<what>"; counters become int64 tensors."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(int(value))
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Gives an optimizer the state that `optimizer_tensors` returned.

    Raises:
        CheckpointMismatch: the state is of other parameters.
    """
    by_parameter: dict[str, dict[str, Any]] = {}
    for name in tensors:
        parameter_name, _, key = name.rpartition("/")
        tensor = tensors[name]
        counter = tensor.dtype == torch.int64 and tensor.dim() == 0
        by_parameter.setdefault(parameter_name, {})[key] = int(tensor) if counter else tensor
    for name, parameter in _named(optimizer):
        state = by_parameter.pop(name, {})
        for key, value in state.items():
            state[key] = value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
        if state:
            optimizer.state[parameter] = state
    if by_parameter:
        raise CheckpointMismatch(
            f"{path}: holds optimizer state of {min(by_parameter)}, which the model does not train"
        )


def restore_model(model: nn.Module, state: TrainingState, path: Path) -> None:
    """Copies a checkpoint's weights into a model."""
    load_tensors(model, state.model, source=str(path))


def _named(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)
