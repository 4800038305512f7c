"""Finds where a number stopped being finite, by repeating the step that showed it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tencentpretrain.engines.base import Engine, MicroStep
from tencentpretrain.model import Model


def find_source(model: Model, engine: Engine, steps: Sequence[MicroStep]) -> str:
    """Repeats forward and backward of an update with its own random numbers and names the first bad module.

    Collective where the engine's `accumulate` is: all processes see the same sums, so all come here together. The
    gradients of the repetition are left in the parameters.

    Returns:
        A sentence about the first weight, output (in the order of the forward pass) or gradient (in the order of the
        backward pass) that is not finite on this process.
    """
    found = _Found()
    handles = [module.register_forward_hook(found.watch(name)) for name, module in model.named_modules() if name]
    try:
        engine.accumulate(model, steps)
    finally:
        for handle in handles:
            handle.remove()
    weight = next((name for name, tensor in model.named_parameters() if not _finite(tensor)), None)
    gradient = next((name for name, tensor in model.named_parameters() if not _finite(tensor.grad)), None)
    said = f"the weight {weight} is not finite" if weight else ""
    if found.output:
        said += f"{' and ' if said else ''}the first bad module is {found.output}: its output is not finite"
    elif found.gradient:
        said = f"the first bad module is {found.gradient}: the gradient of its output is not finite"
    elif gradient:
        said = f"the first bad module is {gradient.rpartition('.')[0]}: the gradient of {gradient} is not finite"
    elif not said:
        said = (
            "repeating the step gave only finite numbers, so memory or an operation without a fixed order is at fault"
        )
    return f"rank {engine.rank}: {said}"


class _Found:
    """The first modules with a bad output and a bad gradient."""

    def __init__(self) -> None:
        self.output = ""
        self.gradient = ""

    def watch(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Returns a forward hook for a module."""

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not self.output and not _finite(tensor):
                    self.output = name
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._receive(name, gradient))  # type: ignore[no-untyped-call]

        return look

    def _receive(self, name: str, gradient: Tensor) -> None:
        if not self.gradient and not _finite(gradient):
            self.gradient = name


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yields the floating tensors inside what a module returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "total"):  # LossSum
        yield from _tensors(value.total)


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(tensor.isfinite().all())
