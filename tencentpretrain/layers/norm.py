"""Layer norms: the toolkit's own form, torch's LayerNorm, T5 norm and RMS norm."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ToolkitNorm(nn.Module):
    """Divides by the unbiased deviation plus eps: gamma * (x - mean) / (std + eps) + beta.

    Models trained with the toolkit depend on this form; it differs from `StandardNorm` by about 1 / (2 size).

    Shapes:
        x: (..., size); the result has its shape and dtype. Statistics are taken in float32.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(size))
        self.beta = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        std, mean = torch.std_mean(wide, dim=-1, keepdim=True)
        return (self.gamma * (wide - mean) / (std + self.eps) + self.beta).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()}, eps={self.eps}"


class StandardNorm(nn.Module):
    """Torch's LayerNorm with the published names gamma and beta (Ba et al. 2016, arXiv:1607.06450, equation 3).

    Shapes:
        x: (..., size); the result has its shape and dtype. Statistics are taken in float32.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(size))
        self.beta = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.size(-1),), self.gamma, self.beta, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()}, eps={self.eps}"


class RootMeanSquareNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4; also T5's norm).

    Shapes:
        x: (..., size); the result has its shape and dtype. The mean is taken in float32.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (self.weight * unit.to(x.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def build_norm(
    kind: Literal["normal", "t5", "rms"], size: int, eps: float, form: Literal["toolkit", "standard"]
) -> nn.Module:
    """Returns the norm that `kind` names; `form` chooses between the two normal norms."""
    if kind == "normal":
        return ToolkitNorm(size, eps) if form == "toolkit" else StandardNorm(size, eps)
    return RootMeanSquareNorm(size, eps)
