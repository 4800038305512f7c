"""Layer norms: the toolkit's own form, torch's LayerNorm, T5 norm and RMS norm.

Under autocast every norm returns the lower precision: what follows is a matrix product, or a residual that one reads.
Statistics are always taken in float32.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HALF = (torch.bfloat16, torch.float16)


def output_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype a norm of x has: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if x.device.type != "cpu":  # only the CPU kernel mixes a low-precision input with float32 parameters
        x, weight, bias = x.float(), weight.float(), bias.float()
    return F.layer_norm(x, (x.size(-1),), weight, bias, eps).to(dtype)


class _ToolkitNorm(torch.autograd.Function):
    """Keeps only the input. Statistics come from torch's layer norm kernel, several times faster than `std_mean`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gamma)
        ctx.eps = eps
        unit, _ = _centred_unit(x, eps)
        return torch.addcmul(beta, unit, gamma)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, gamma = ctx.saved_tensors
        size = x.size(-1)
        unit, std = _centred_unit(x, ctx.eps)
        grad_gamma = (gradient * unit).reshape(-1, size).sum(0)
        grad_beta = gradient.reshape(-1, size).sum(0)
        scaled = gradient * gamma
        along = (scaled * unit).sum(-1, keepdim=True) / ((size - 1) * std)
        grad_x = scaled.sub_(scaled.mean(-1, keepdim=True)).div_(std + ctx.eps)
        return torch.addcmul(grad_x, unit, along, value=-1), grad_gamma, grad_beta, None


def _centred_unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (x - mean) / (std + eps) and the unbiased std (..., 1), at least 1e-15."""
    size = x.size(-1)
    unit, _, inverse = torch.native_layer_norm(x, (size,), None, None, 1e-30)
    shrink = math.sqrt((size - 1) / size)
    std = 1 / (shrink * inverse)
    return unit.mul_(shrink * std / (std + eps)), std


class _ScaledNorm(nn.Module):
    """The parameters of the norms with scale gamma and shift beta."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(size))
        self.beta = nn.Parameter(torch.zeros(size))

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()}, eps={self.eps}"


class ToolkitNorm(_ScaledNorm):
    """Divides by the unbiased deviation plus eps: gamma * (x - mean) / (std + eps) + beta.

    Models trained with the toolkit depend on this form; it differs from `StandardNorm` by about 1 / (2 size).

    Shapes:
        x: (..., size); the result has its shape.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = output_dtype(x)
        if dtype not in HALF:
            normed: Tensor = _ToolkitNorm.apply(x, self.gamma, self.beta, self.eps)
            return normed
        # Torch's kernel with gamma shrunk by sqrt((n-1)/n). Its eps stands inside the root: sqrt(std^2 + eps^2) and
        # std + eps agree to half precision for every std above 500 eps.
        shrink = math.sqrt((x.size(-1) - 1) / x.size(-1))
        return _layer_norm(x, self.gamma * shrink, self.beta, (shrink * self.eps) ** 2, dtype)


class StandardNorm(_ScaledNorm):
    """Torch's LayerNorm with the published names gamma and beta (Ba et al. 2016, arXiv:1607.06450, equation 3).

    Shapes:
        x: (..., size); the result has its shape.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _layer_norm(x, self.gamma, self.beta, self.eps, output_dtype(x))


class RootMeanSquareNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4; also T5's norm).

    Shapes:
        x: (..., size); the result has its shape.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = output_dtype(x)
        wide = x.float() if x.dtype in HALF else x
        unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight.to(dtype) * unit.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def build_norm(
    kind: Literal["normal", "t5", "rms"], size: int, eps: float, form: Literal["toolkit", "standard"]
) -> nn.Module:
    """Returns the norm that `kind` names; `form` chooses between the two normal norms."""
    if kind == "normal":
        return ToolkitNorm(size, eps) if form == "toolkit" else StandardNorm(size, eps)
    return RootMeanSquareNorm(size, eps)
