"""One process on one CPU or GPU."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tencentpretrain.checkpoint.layout import Layout
from tencentpretrain.config.train import PrecisionConfig
from tencentpretrain.engines.base import Losses, MicroStep, Snapshot, Update, Values
from tencentpretrain.engines.host_memory import keep_freed_memory
from tencentpretrain.engines.ownership import collect
from tencentpretrain.engines.processes import Group
from tencentpretrain.engines.reading import detached, read, values_of
from tencentpretrain.errors import ConfigError, NonFiniteGradientError, ResourceError
from tencentpretrain.model import Model
from tencentpretrain.optim.state import optimizer_tensors, restore_optimizer

_SMALLEST_SCALE = 2.0**-10
"""A loss scale below which overflow is no longer a matter of scale."""


T = TypeVar("T")


class LocalEngine:
    """Runs steps in this process, and is what engines of several processes start from.

    Args:
        config: number formats, device, threads, determinism, compilation.

    Raises:
        ConfigError: the settings contradict each other or the device.
        ResourceError: the device is not there.
    """

    rank = 0
    world_size = 1
    data_rank = 0
    data_size = 1
    group = Group()
    holds_parts = False
    """Whether this process holds less than whole tensors."""

    def __init__(self, config: PrecisionConfig) -> None:
        self.config = config
        self.layout = Layout()
        self.device = choose_device(config.device)
        if config.fp16 and config.bf16:
            raise ConfigError("fp16: cannot be on together with bf16; choose one")
        if config.fp16 and self.device.type != "cuda":
            raise ConfigError(f"fp16: needs a GPU, but the device is {self.device}; use --bf16 there")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if self.device.type == "cpu":
            keep_freed_memory()
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.fp16)

    def construct(self, make: Callable[[], Model]) -> Model:
        return make()

    def place(self, model: nn.Module) -> None:
        """Moves a model to the device and compiles it if that was asked for."""
        model.to(self.device)
        if self.config.compile:
            model.compile()  # in place, so tensor names stay

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        self.place(model)
        return make_optimizer(model)

    def autocast(self) -> AbstractContextManager[Any]:
        if not (self.config.bf16 or self.config.fp16):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.float16 if self.config.fp16 else torch.bfloat16)

    def accumulate(self, model: nn.Module, steps: Sequence[MicroStep]) -> Losses:
        outputs = []
        for step in steps:
            torch.manual_seed(step.seed)
            with self.autocast():
                losses = model(step.batch.to(self.device, non_blocking=True)).losses
            shares = [loss.total / max(step.divisor[name], 1) for name, loss in losses.items()]
            self.backward(torch.stack(shares).sum())
            outputs.append(detached(losses))
        return outputs

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss."""
        torch.autograd.backward(self._scaler.scale(loss))

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        losses: Losses,
        *,
        max_norm: float | None,
        inspect: Callable[[Values], None] = lambda values: None,
    ) -> Update:
        self.reduce_gradients(optimizer)
        self._scaler.unscale_(optimizer)
        numbers, norm = read(losses, self.gradient_norm(optimizer))  # the only wait for the device
        values = values_of(self.sum_numbers(numbers), losses)
        inspect(values)
        finite = math.isfinite(norm)
        if not finite and (not self._scaler.is_enabled() or self._scaler.get_scale() < _SMALLEST_SCALE):
            raise NonFiniteGradientError("the gradient is not finite")
        if finite and max_norm is not None and norm > max_norm:
            torch._foreach_mul_(gradients(optimizer), max_norm / norm)
        self._scaler.step(optimizer)
        self._scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return Update(values=values, gradient_norm=norm, applied=finite)

    def reduce_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the gradients those of all processes."""

    def sum_numbers(self, numbers: Tensor) -> Tensor:
        """Returns float64 numbers of the host summed over all data ranks."""
        return numbers

    def gradient_norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Returns the global L2 norm () of the gradients, without waiting for the device."""
        found = gradients(optimizer)
        if not found:
            return torch.zeros((), device=self.device)
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(found)])
        total: Tensor = torch.linalg.vector_norm(norms)
        return total

    def sum_over_ranks(self, counts: Mapping[str, float]) -> dict[str, float]:
        numbers = self.sum_numbers(torch.tensor(list(counts.values()), dtype=torch.float64))
        return dict(zip(counts, numbers.tolist(), strict=True))

    def gather(self, value: T) -> list[T]:
        """Returns the value of each process, by rank. Collective."""
        return self.group.gather(value)

    def any_rank(self, flag: bool) -> bool:
        return flag

    def snapshot(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
        parts = (self.layout.tensors(model), optimizer_tensors(optimizer))
        weights, state = (
            collect(tensors, self.group, self.layout.read, together=self.holds_parts) for tensors in parts
        )
        return Snapshot(model=weights, optimizer=state)

    def restore_optimizer(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        restore_optimizer(optimizer, tensors)

    def state(self) -> dict[str, Any]:
        return dict(self._scaler.state_dict())

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self._scaler.is_enabled() and state:
            self._scaler.load_state_dict(dict(state))


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Returns the gradients of all parameters that have one."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def choose_device(name: str) -> torch.device:
    """Returns the device that a setting names; "auto" is the GPU if there is one.

    Raises:
        ConfigError: the name is none.
        ResourceError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is none; use auto, cpu, cuda or cuda:<index>") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = device.index or 0
        if index >= count:
            raise ResourceError(f"device {name}: this machine has {count or 'no'} GPU{'s' if count > 1 else ''}")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise ConfigError(f"device: {name!r} is not supported; use auto, cpu, cuda or cuda:<index>")
    return device
