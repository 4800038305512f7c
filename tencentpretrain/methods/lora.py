"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, section 4.1) of query and value projections."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from tencentpretrain.errors import ConfigError
from tencentpretrain.layers.attention import Attention
from tencentpretrain.layers.dropout import Dropout

ADAPTED = (0, 2)
"""Query and value among an attention's `linear_layers`."""


class LoraLinear(nn.Linear):
    """W x + b + (alpha / r) B A dropout(x), with the published names lora_A (r, in) and lora_B (out, r).

    It takes over the weight, which it freezes, and the bias of an existing layer; the product starts at zero.
    """

    def __init__(self, base: nn.Linear, *, r: int, alpha: float, dropout: float) -> None:
        # Built without storage of its own: the weights of the base layer move in.
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight = base.weight.requires_grad_(False)
        self.bias = base.bias
        self.r = r
        self.alpha = alpha
        self.scaling = alpha / r
        self.dropout = Dropout(dropout)
        self.lora_A = nn.Parameter(base.weight.new_empty(r, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, r))
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Draws lora_A (Kaiming uniform, a = sqrt 5) and zeroes lora_B."""
        if not self.lora_A.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def forward(self, input: Tensor) -> Tensor:
        plain = F.linear(input, self.weight, self.bias)
        return plain + F.linear(F.linear(self.dropout(input), self.lora_A), self.lora_B) * self.scaling

    def merged(self) -> nn.Linear:
        """Returns a plain layer with the adapter added to the weight."""
        base = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        update = (self.lora_B.float() @ self.lora_A.float()) * self.scaling
        base.weight = nn.Parameter((self.weight.float() + update).to(self.weight.dtype).detach())
        base.bias = self.bias
        return base

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}"


def add_lora(model: nn.Module, *, r: int, alpha: float, dropout: float = 0.0) -> int:
    """Puts adapters on query and value projection of every attention; returns how many.

    Raises:
        ConfigError: r is not positive, the model has no attention, or it has adapters already.
    """
    if r < 1:
        raise ConfigError(f"lora_r must be at least 1, but is {r}")
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    if not attentions:
        raise ConfigError("use_lora needs a model with attention, but this encoder has none")
    for attention in attentions:
        for index in ADAPTED:
            base = attention.linear_layers[index]
            assert isinstance(base, nn.Linear)
            if isinstance(base, LoraLinear):
                raise ConfigError("the model has LoRA adapters already; merge them before adding others")
            attention.linear_layers[index] = LoraLinear(base, r=r, alpha=alpha, dropout=dropout)
    return len(ADAPTED) * len(attentions)


def merge_lora(model: nn.Module) -> int:
    """Adds every adapter to its weight and removes it; returns how many."""
    merged = 0
    for module in model.modules():
        if isinstance(module, Attention):
            for index in ADAPTED:
                layer = module.linear_layers[index]
                if isinstance(layer, LoraLinear):
                    module.linear_layers[index] = layer.merged()
                    merged += 1
    return merged


def mark_only_lora_trainable(model: nn.Module) -> None:
    """Freezes every parameter that is not an adapter."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the adapters alone, as published LoRA files hold them."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}


def is_adapter(name: str) -> bool:
    """Returns whether a published name is that of an adapter's weight."""
    return "lora_" in name
