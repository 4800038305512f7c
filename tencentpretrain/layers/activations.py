"""Activations by the names of the model JSON (formulas: Hendrycks and Gimpel 2016, arXiv:1606.08415)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """Returns x * Phi(x), with the exact normal distribution function."""
    return F.gelu(x)


def gelu_fast(x: Tensor) -> Tensor:
    """Returns the tanh approximation of x * Phi(x) (arXiv:1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")


def linear(x: Tensor) -> Tensor:
    """Returns x itself."""
    return x


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"gelu": gelu, "gelu_fast": gelu_fast, "relu": F.relu, "silu": F.silu, "linear": linear}
)
"""Activation functions by name."""
