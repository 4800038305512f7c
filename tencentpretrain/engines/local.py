"""One process on one CPU or GPU."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from tencentpretrain.config.train import PrecisionConfig
from tencentpretrain.engines.host_memory import keep_freed_memory
from tencentpretrain.errors import ConfigError, NonFiniteError, ResourceError

_SMALLEST_SCALE = 2.0**-10
"""A loss scale below which overflow is no longer a matter of scale."""


class LocalEngine:
    """Runs steps in this process.

    Args:
        config: number formats, device, threads, determinism, compilation.

    Raises:
        ConfigError: the settings contradict each other or the device.
        ResourceError: the device is not there.
    """

    rank = 0
    world_size = 1

    def __init__(self, config: PrecisionConfig) -> None:
        self.config = config
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

    def prepare(self, model: nn.Module) -> nn.Module:
        model.to(self.device)
        if self.config.compile:
            model.compile()  # in place, so tensor names stay
        return model

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def autocast(self) -> AbstractContextManager[Any]:
        if not (self.config.bf16 or self.config.fp16):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.float16 if self.config.fp16 else torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(self._scaler.scale(loss))

    def sum_over_ranks(self, counts: Mapping[str, int]) -> dict[str, int]:
        return dict(counts)

    def any_rank(self, flag: bool) -> bool:
        return flag

    def gradient_norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        self._scaler.unscale_(optimizer)
        gradients = [parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.device)
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        total: Tensor = torch.linalg.vector_norm(norms)
        return total

    def update(self, optimizer: torch.optim.Optimizer, *, gradient_norm: float, max_norm: float | None) -> bool:
        finite = math.isfinite(gradient_norm)
        if not finite and (not self._scaler.is_enabled() or self._scaler.get_scale() < _SMALLEST_SCALE):
            raise NonFiniteError("the gradient is not finite")
        if finite and max_norm is not None and gradient_norm > max_norm:
            gradients = [parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None]
            torch._foreach_mul_(gradients, max_norm / gradient_norm)
        self._scaler.step(optimizer)
        self._scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return finite

    def state(self) -> dict[str, Any]:
        return dict(self._scaler.state_dict())

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self._scaler.is_enabled() and state:
            self._scaler.load_state_dict(dict(state))


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


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
