"""Random initial weights, by the type of each layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tencentpretrain.layers.attention import Attention
from tencentpretrain.layers.feed_forward import FeedForward, GatedFeedForward
from tencentpretrain.layers.norm import RootMeanSquareNorm, StandardNorm, ToolkitNorm

NORMS = (ToolkitNorm, StandardNorm, RootMeanSquareNorm)

LOGIT_SCALE = math.log(1 / 0.07)
"""Start of the contrastive temperature's logarithm (CLIP, Radford et al. 2021, arXiv:2103.00020, section 2.5)."""


class SkipDefaults(TorchFunctionMode):
    """Inside this context layers are built with whatever stands in memory, for models that `initialize` fills next."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def initialize(
    model: nn.Module,
    *,
    std: float = 0.02,
    deep: bool = False,
    num_layers: int = 1,
    generator: torch.Generator | None = None,
) -> None:
    """Overwrites every parameter: weights from N(0, std), biases and norm shifts 0, norm scales 1.

    Args:
        model: what to initialise; a tensor shared by several modules is drawn once.
        std: standard deviation.
        deep: divide the deviation of each block's output projections by sqrt(2 num_layers) (GPT-2's rule).
        num_layers: depth of the model, for `deep`.
        generator: source of the random numbers; torch's global one if None.
    """
    narrow = std / math.sqrt(2 * num_layers)
    outputs: set[int] = set()
    done: set[int] = set()
    if deep:
        for module in model.modules():
            if isinstance(module, Attention):
                outputs.add(id(module.final_linear))
            elif isinstance(module, (FeedForward, GatedFeedForward)):
                outputs.add(id(module.linear_2))
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in done:
                    done.add(id(parameter))
                    _fill(module, name, parameter, narrow if id(module) in outputs else std, generator)


def _fill(module: nn.Module, name: str, parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    if name in ("gamma", "weight") and isinstance(module, NORMS):
        parameter.fill_(1.0)
    elif name == "beta" or name.startswith("bias") or name in getattr(module, "bias_names", ()):
        parameter.zero_()
    elif name == "logit_scale":
        parameter.fill_(LOGIT_SCALE)
    else:
        parameter.normal_(0.0, std, generator=generator)
