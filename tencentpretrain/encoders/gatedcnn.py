"""Causal gated convolutions (Dauphin et al. 2017, arXiv:1612.08083, section 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.encoders.base import Encoder
from tencentpretrain.layers.build import required
from tencentpretrain.registry import ENCODERS


class BiasMaps(nn.ParameterList):
    """A learned bias per channel for each convolution after the first, besides the convolution's own."""

    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__(nn.Parameter(torch.zeros(1, hidden_size, 1, 1)) for _ in range(count))
        self.bias_names = tuple(str(index) for index in range(count))


@ENCODERS.register("gatedcnn")
class GatedCnnEncoder(Encoder):
    """Convolutions over time, each times the sigmoid of another, with a residual every `block_size` layers.

    Left padding of kernel_size - 1 keeps it causal. There is no dropout.
    """

    bias_names = ("conv_b1", "gate_b1")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        part = "encoder 'gatedcnn'"
        emb_size = required(config.emb_size, "emb_size", part)
        hidden_size = required(config.hidden_size, "hidden_size", part)
        num_layers = required(config.num_layers, "layers_num", part)
        self.kernel_size = required(config.kernel_size, "kernel_size", part)
        self.block_size = required(config.block_size, "block_size", part)
        first, later = (self.kernel_size, emb_size), (self.kernel_size, 1)
        self.conv_1 = nn.Conv2d(1, hidden_size, first)
        self.conv_b1 = nn.Parameter(torch.zeros(1, hidden_size, 1, 1))
        self.gate_1 = nn.Conv2d(1, hidden_size, first)
        self.gate_b1 = nn.Parameter(torch.zeros(1, hidden_size, 1, 1))
        depth = range(num_layers - 1)
        self.conv = nn.ModuleList(nn.Conv2d(hidden_size, hidden_size, later) for _ in depth)
        self.conv_b = BiasMaps(hidden_size, num_layers - 1)
        self.gate = nn.ModuleList(nn.Conv2d(hidden_size, hidden_size, later) for _ in depth)
        self.gate_b = BiasMaps(hidden_size, num_layers - 1)

    def forward(self, emb: Tensor, segment_ids: Tensor, has_padding: bool = True) -> Tensor:  # type: ignore[override]
        padding = (0, 0, self.kernel_size - 1, 0)
        padded = F.pad(emb.unsqueeze(1), padding)
        hidden: Tensor = (self.conv_1(padded) + self.conv_b1) * torch.sigmoid(self.gate_1(padded) + self.gate_b1)
        residual = hidden
        layers = zip(self.conv, self.conv_b, self.gate, self.gate_b, strict=True)
        for number, (conv, conv_b, gate, gate_b) in enumerate(layers, start=1):
            padded = F.pad(hidden, padding)
            hidden = (conv(padded) + conv_b) * torch.sigmoid(gate(padded) + gate_b)
            if number % self.block_size == 0:
                hidden = hidden + residual
                residual = hidden
        return hidden.squeeze(3).transpose(1, 2)
