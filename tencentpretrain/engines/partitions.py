"""Parameters cut into flat parts over the processes (ZeRO stage 3, Rajbhandari et al. 2020, arXiv:1910.02054).

DeepSpeed leaves an empty tensor in the place of a parameter and keeps this process's part beside it: the elements from
rank * part to (rank + 1) * part of the flattened tensor, padded at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tencentpretrain.checkpoint.layout import Layout

Partition = Callable[[nn.Module], object]
"""Cuts the parameters of a module that are still whole."""


class PartitionedLayout(Layout):
    """Each process holds a flat part of each parameter; buffers and new parameters are whole."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        for module in model.modules():
            if isinstance(module, nn.Linear) and _is_lost(module.weight):
                _renew(module, self._partition)
        return super().tensors(model)

    def shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        return whole_shape(tensor)

    @torch.no_grad()
    def write(self, name: str, tensor: Tensor, values: Tensor) -> None:
        if is_partitioned(tensor):
            write_part(tensor, values)
        else:
            super().write(name, tensor, values)

    @torch.no_grad()
    def read(self, name: str, tensor: Tensor) -> Tensor:
        if not is_partitioned(tensor):
            return super().read(name, tensor)
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True)


class FillParts(TorchFunctionMode):
    """Inside this context filling a cut parameter in place fills its part.

    Random values are drawn for the whole tensor, so every layout starts from the same bits; one tensor at a time is
    whole.
    """

    _FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._FILLS and is_partitioned(args[0]):
            values = torch.empty(whole_shape(args[0]))
            func(values, *args[1:], **kwargs)
            write_part(args[0], values)
            return args[0]
        return func(*args, **kwargs)


class Stand(nn.Module):
    """Stands for a model whose parameters are not whole: the same names, shapes and order, without values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._named = [
            (name, nn.Parameter(torch.empty(whole_shape(parameter), device="meta"), parameter.requires_grad))
            for name, parameter in model.named_parameters()
        ]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._named)


def is_partitioned(tensor: object) -> bool:
    """Returns whether this process holds only a part of the tensor."""
    return hasattr(tensor, "ds_tensor")


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Returns the shape of the whole tensor."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def write_part(parameter: Any, values: Tensor) -> None:
    """Stores this process's part of the whole values, or of their first rows; the rest stays as it is."""
    part: Tensor = parameter.ds_tensor
    begin = parameter.ds_zero_partition_rank * part.ds_numel  # type: ignore[attr-defined]
    flat = values.reshape(-1)[begin : begin + part.numel()]
    part[: flat.numel()].copy_(flat)


@contextmanager
def cast_parts(parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Casts parameters or their parts, yielding what they held before, by name."""
    exact: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            continue
        if is_partitioned(parameter):
            part: Any = parameter.ds_tensor  # type: ignore[attr-defined]
            exact[name] = part.data
            part.data = part.data.to(dtype)
        else:
            exact[name] = parameter.data
        parameter.data = parameter.data.to(dtype)
    yield exact


def _is_lost(weight: Tensor) -> bool:
    """Whether this is the copy of a cut parameter's placeholder, as untying a head makes it."""
    return weight.numel() == 0 and not is_partitioned(weight) and not weight.is_meta


def _renew(module: nn.Linear, partition: Partition) -> None:
    module.weight = nn.Parameter(torch.zeros(module.out_features, module.in_features), module.weight.requires_grad)
    partition(module)
