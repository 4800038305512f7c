"""Feed-forward layers of a transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from tencentpretrain.layers.activations import ACTIVATIONS


class FeedForward(nn.Module):
    """linear_2(act(linear_1 x)) (Vaswani et al. 2017, arXiv:1706.03762, section 3.3).

    Shapes:
        x: (..., hidden_size); the result has its shape.
    """

    def __init__(self, hidden_size: int, inner_size: int, activation: str, *, bias: bool = True) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.linear_1 = nn.Linear(hidden_size, inner_size, bias=bias)
        self.linear_2 = nn.Linear(inner_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return output


class GatedFeedForward(nn.Module):
    """linear_2(act(linear_gate x) * linear_1 x) (Shazeer 2020, arXiv:2002.05202, section 2).

    Shapes:
        x: (..., hidden_size); the result has its shape.
    """

    def __init__(self, hidden_size: int, inner_size: int, activation: str, *, bias: bool = True) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.linear_gate = nn.Linear(hidden_size, inner_size, bias=bias)
        self.linear_1 = nn.Linear(hidden_size, inner_size, bias=bias)
        self.linear_2 = nn.Linear(inner_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear_2(self.activation(self.linear_gate(x)) * self.linear_1(x))
        return output
