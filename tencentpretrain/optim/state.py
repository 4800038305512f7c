"""An optimizer's state as named tensors, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tencentpretrain.errors import CheckpointMismatch


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns an optimizer's state as tensors named "<parameter>/<what>"; counters become int64 tensors."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(optimizer):
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):  # a restored state has another order
            tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(int(value))
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
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
            f"the checkpoint holds optimizer state of {min(by_parameter)}, which the model does not train"
        )


def _named(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)
