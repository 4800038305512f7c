"""Reading, and replacing, named values of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tencentpretrain.errors import ConfigError
from tencentpretrain.model import Model
from tencentpretrain.registry import nearest

Replacement = Callable[[Any], Any]


def tap_points(model: Model) -> dict[str, nn.Module]:
    """Returns the module behind each tap name.

    The names are `embedding`, `encoder`, `tgt_embedding`, `decoder`, `encoder.layer.0` and so on, and `logits.<loss>`
    (`logits.mlm`, `logits.bilm_forward`). Every other module path (`encoder.transformer.0.self_attn`) is a name too.
    """
    points = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    for target in model.target.names:
        for name, module in model.target.get_submodule(target).named_children():
            if name == "logits" or name.startswith("logits_"):
                points[name.replace("logits", f"logits.{target}", 1)] = module
    return points


class Taps(Mapping[str, Any]):
    """Keeps the output of named modules while the `with` block runs. A model that is not tapped pays nothing.

    A name whose module runs more than once in a forward pass holds the last output.

    Args:
        model: the model.
        names: what to read.
        replace: by name, a function from the value to the one that takes its place.
        detach: keep values outside the gradient's graph.

    Raises:
        ConfigError: a name is not in the model.
    """

    def __init__(
        self, model: Model, *names: str, replace: Mapping[str, Replacement] | None = None, detach: bool = False
    ) -> None:
        points = tap_points(model)
        self._replace = dict(replace or {})
        self._names = tuple(dict.fromkeys((*names, *self._replace)))
        unknown = [name for name in self._names if name not in points]
        if unknown:
            raise ConfigError(
                [f"the model has nothing named {name!r} to tap{nearest(name, points)}" for name in unknown]
            )
        self._modules = {name: points[name] for name in self._names}
        self._detach = detach
        self._values: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Taps:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> Any:
            change = self._replace.get(name)
            if change is not None:
                output = change(output)
            self._values[name] = _detached(output) if self._detach else output
            return output if change is not None else None

        return keep

    def __getitem__(self, name: str) -> Any:
        if name in self._modules and name not in self._values:
            raise KeyError(f"{name}: no forward pass has reached it yet")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _detached(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_detached(item) for item in value)
    return value.detach() if hasattr(value, "detach") else value
