"""Building a model of which this process holds a part: nothing whole is ever stored but one tensor at a time.

The model is made on the meta device, cut, and only then given memory. Initial values are drawn tensor by tensor in the
order of the whole model, so every layout starts from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tencentpretrain.model import Model
from tencentpretrain.parallel.tensor import Plan

_FILLS = ("normal_", "fill_", "zero_")


@dataclass(frozen=True)
class _Fill:
    """A call that gives a tensor its initial values."""

    tensor: Tensor
    method: str
    inputs: tuple[Any, ...]
    settings: Mapping[str, Any]


class _Recorder(TorchFunctionMode):
    """Notes what would fill tensors of the meta device, which have no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.fills: list[_Fill] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":  # defaults that are overwritten
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        name = getattr(func, "__name__", "")
        if name in _FILLS and args and isinstance(args[0], nn.Parameter) and args[0].is_meta:
            self.fills.append(_Fill(args[0], name, args[1:], kwargs))
            return args[0]
        return func(*args, **kwargs)


class Blueprint:
    """A model without memory, and how its tensors are filled.

    Args:
        make: builds the model.
    """

    def __init__(self, make: Callable[[], Model]) -> None:
        recorder = _Recorder()
        with torch.device("meta"), recorder:
            self.model = make()
        self.whole: dict[str, Tensor] = dict(self.model.state_dict(keep_vars=True))
        self._fills = recorder.fills

    @torch.no_grad()
    def materialize(self, plan: Plan) -> None:
        """Gives the tensors that are still in the model their memory and values, each cut as the plan says."""
        local: dict[int, nn.Parameter] = {}
        part_of = {id(tensor): plan.slices.get(name) for name, tensor in self.whole.items()}
        for module in self.model.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                part = part_of[id(parameter)]
                if id(parameter) not in local:
                    shape = tuple(parameter.shape) if part is None else part.shape(tuple(parameter.shape))
                    values = torch.zeros(shape, dtype=parameter.dtype)
                    local[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                setattr(module, leaf, local[id(parameter)])
        for fill in self._fills:
            held, part = local.get(id(fill.tensor)), part_of[id(fill.tensor)]
            if held is None and fill.method != "normal_":
                continue
            # A tensor held elsewhere is drawn too: the next one's numbers come after it.
            values = torch.empty(fill.tensor.shape, dtype=fill.tensor.dtype)
            getattr(values, fill.method)(*fill.inputs, **fill.settings)
            if held is not None:
                held.copy_(values if part is None else part.of(values))


def tied(whole: Mapping[str, Tensor]) -> dict[str, str]:
    """Maps each name to the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in whole.items()}


def names_of(module: nn.Module) -> Iterable[str]:
    """Returns the names of the parameters of a model, a tied one under each of its names."""
    return [name for name, _ in module.named_parameters(remove_duplicate=False)]
