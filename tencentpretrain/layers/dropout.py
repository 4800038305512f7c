"""Dropout (Srivastava et al. 2014, JMLR 15, section 4), in the inverted form that leaves evaluation untouched."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Returns x with each element zeroed with probability p and the rest scaled so that the mean stays."""
    return F.dropout(x, p, training) if training and p > 0 else x


def add_dropout(residual: Tensor, x: Tensor, p: float, training: bool) -> Tensor:
    """Returns residual + dropout(x)."""
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
