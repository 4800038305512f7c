"""Dropout (Srivastava et al. 2014, JMLR 15, section 4), in the inverted form that leaves evaluation untouched.

Torch draws one random number per element on the CPU, which takes longer there than the activation it follows. Here one
random word serves four elements: 16 bits each, compared with a threshold. The rate is therefore a multiple of 1/65536,
and the scale is that of the rate really used, so the expectation is exact. The words come from a generator seeded by
one draw from torch's: `torch.manual_seed` and the generator state that recomputation restores decide the mask, the
number of threads does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LANES = 1 << 16
"""Values of one 16-bit lane of a random word."""


def rate_used(p: float) -> float:
    """Returns the multiple of 1/65536 nearest to p, and below 1."""
    return min(round(p * LANES), LANES - 1) / LANES


def draw_kept(shape: Sequence[int], p: float) -> Tensor:
    """Draws, on the CPU, which elements stay.

    Returns:
        Tensor of that shape, int16: 1 with probability 1 - rate_used(p), else 0.
    """
    count = math.prod(shape)
    seed = int(torch.randint(torch.iinfo(torch.int64).max, (), device="cpu"))
    generator = np.random.Generator(np.random.SFC64(seed))
    words = generator.integers(0, 1 << 64, dtype=np.uint64, size=-(-count // 4))
    kept = torch.from_numpy(words.view(np.int16))[:count].view(tuple(shape))
    return torch.ge(kept, round(rate_used(p) * LANES) - LANES // 2, out=kept)


def zero_dropped(x: Tensor, kept: Tensor) -> Tensor:
    """Returns x where `kept` (0 or 1, of an integer type) is 1 and zero elsewhere."""
    if x.dtype in (torch.bfloat16, torch.float16):  # integer multiplication of the bits: exact, and much faster
        return (x.view(torch.int16) * kept.to(torch.int16)).view(x.dtype)
    return x * kept.to(x.dtype)


def is_fast(x: Tensor) -> bool:
    """Tells whether these kernels serve x; otherwise torch's own do: on other devices and inside `torch.compile`."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept = draw_kept(x.shape, p)
        ctx.scale = 1 / (1 - rate_used(p))
        ctx.save_for_backward(kept.to(torch.uint8))
        return zero_dropped(x, kept).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return zero_dropped(gradient, kept).mul_(ctx.scale), None


class _AddDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, p: float) -> Tensor:
        kept = draw_kept(x.shape, p)
        ctx.scale, ctx.dtype = 1 / (1 - rate_used(p)), x.dtype
        ctx.save_for_backward(kept.to(torch.uint8))
        return torch.add(residual, zero_dropped(x, kept).to(residual.dtype), alpha=ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (kept,) = ctx.saved_tensors
        return gradient, zero_dropped((gradient * ctx.scale).to(ctx.dtype), kept), None


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Returns x with each element zeroed with probability p and the rest scaled so that the mean stays."""
    if not training or p == 0:
        return x
    return _Dropout.apply(x, p) if is_fast(x) else F.dropout(x, p)


def add_dropout(residual: Tensor, x: Tensor, p: float, training: bool) -> Tensor:
    """Returns residual + dropout(x); both have the same shape."""
    if not training or p == 0:
        return residual + x
    if is_fast(x) and torch.promote_types(residual.dtype, x.dtype) == residual.dtype:
        summed: Tensor = _AddDropout.apply(residual, x, p)
        return summed
    return residual + dropout(x, p, training)


class Dropout(nn.Module):
    """Zeroes elements with probability p while training.

    Shapes:
        x: any; the result has its shape and dtype.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout rate must lie in [0, 1), but is {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"
