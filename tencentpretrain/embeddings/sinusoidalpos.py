"""Fixed sinusoidal positions (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.embeddings.base import EmbeddingPart
from tencentpretrain.errors import ConfigError
from tencentpretrain.layers.build import required
from tencentpretrain.registry import EMBEDDINGS

FIRST_ROW = 2
"""The table row of a sample's first token in the toolkit layout."""


def sinusoid_table(length: int, size: int, *, halves: bool, spread: int) -> Tensor:
    """Returns (length, size) float32: sin(p w_k) and cos(p w_k) with w_k = 10000^(-k / spread), k = 0 ... size/2 - 1.

    Args:
        halves: sines in the first half of the columns, cosines in the second, instead of one after the other.
        spread: number of steps from frequency 1 to frequency 1/10000.
    """
    frequencies = torch.exp(torch.arange(size // 2, dtype=torch.float32) * -(math.log(10000.0) / spread))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies[None, :]
    if halves:
        return torch.cat((angles.sin(), angles.cos()), dim=1)
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)


@EMBEDDINGS.register("sinusoidalpos")
class SinusoidalPositions(EmbeddingPart):
    """Fixed positions, without parameters and of any length.

    The toolkit layout starts at table row 2, gives padding zeros, spreads frequencies over E/2 - 1 steps, and zeroes
    the row whose number is the padding token's id (models were trained so). The standard layout (PEGASUS, Zhang et al.
    2020) starts at row 0, gives padding positions too, spreads frequencies over E/2 steps and has sines before cosines.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, pad_id: int = 0) -> None:
        super().__init__()
        self.size = required(config.emb_size, "emb_size", "embedding 'sinusoidalpos'")
        if self.size % 2 or self.size < 4:
            raise ConfigError(f"embedding 'sinusoidalpos' needs an even emb_size of at least 4, but it is {self.size}")
        self.standard = config.sinusoid_layout == "standard"
        self.halves = self.standard or "speech" in config.embedding
        self.pad_id = pad_id
        self._length = config.max_seq_length
        self._table: Tensor | None = None

    def table(self, length: int, device: torch.device) -> Tensor:
        """Returns at least `length` rows on `device`; grown as needed, in float32 whatever the model's dtype."""
        if self._table is None or self._table.size(0) < length or self._table.device != device:
            self._length = max(length, self._length)
            spread = self.size // 2 if self.standard else self.size // 2 - 1
            table = sinusoid_table(self._length, self.size, halves=self.halves, spread=spread)
            if not self.standard and self.pad_id < self._length:
                table[self.pad_id] = 0
            self._table = table.to(device)
        return self._table

    def forward(
        self, token_ids: Tensor, segment_ids: Tensor, *, start: int = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        end = start + segment_ids.size(1)
        table = self.table(end + FIRST_ROW, segment_ids.device)
        if self.standard:
            return table[start:end].unsqueeze(0) if position_ids is None else table[position_ids]
        real = segment_ids != 0
        position = real.long().cumsum(dim=1) + (start - 1) if position_ids is None else position_ids
        row = position + FIRST_ROW
        return table[row] * real.unsqueeze(-1)
