"""Rotary positions (Su et al. 2021, arXiv:2104.09864, section 3.2.2), in the layout of consecutive pairs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tencentpretrain.config.model import RopeScaling

RotaryTable = tuple[Tensor, Tensor]


def at_positions(table: RotaryTable, position_ids: Tensor) -> RotaryTable:
    """Returns the rows of a table for each token: (B, 1, S, D / 2) for position_ids (B, S)."""
    cosine, sine = table
    return cosine[position_ids].unsqueeze(1), sine[position_ids].unsqueeze(1)


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotates the pairs (0, 1), (2, 3), ... of each head in float32.

    Shapes:
        x: (B, N, S, D).
        table: cosines and sines, float32, (S, D / 2) each, or (B, 1, S, D / 2) where rows have positions of their own.
    """
    cosine, sine = table
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2).to(x.dtype)


class RotaryPositions:
    """Cosines and sines by position, computed on demand and kept in float32 whatever the model's dtype.

    It is no module: a table must neither be saved nor cast with the weights.

    Args:
        head_dim: width D of a head.
        theta: base of the frequencies.
        scaling: stretch beyond the trained length.
        width: the width frequencies are spread over; published files use hidden_size / num_heads.
        max_length: trained length, for scalings that do not name their own.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        scaling: RopeScaling | None = None,
        width: int | None = None,
        max_length: int = 512,
    ) -> None:
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, but it is {head_dim}")
        self.head_dim = head_dim
        self.width = width or head_dim
        self.theta = theta
        self.scaling = scaling
        self.trained_length = (scaling.original_max_seq_length if scaling else None) or max_length
        self._tables: dict[torch.device, RotaryTable] = {}

    def __call__(self, length: int, device: torch.device, *, start: int = 0) -> RotaryTable:
        """Returns cosines and sines of positions start ... start + length - 1, (length, D / 2) each."""
        end = start + length
        if self.scaling is not None and self.scaling.type == "dynamic" and end > self.trained_length:
            cosine, sine = self._compute(end, device)
        else:
            cosine, sine = self._tables.get(device, (None, None))  # type: ignore[assignment]
            if cosine is None or cosine.size(0) < end:
                rows = max(end, 2 * self.trained_length)
                if self.scaling is not None and self.scaling.type == "dynamic":
                    rows = self.trained_length
                cosine, sine = self._tables[device] = self._compute(rows, device)
        return cosine[start:end], sine[start:end]

    def _compute(self, length: int, device: torch.device) -> RotaryTable:
        frequencies, magnitude = self._frequencies(length)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
        return (angles.cos() * magnitude).to(device), (angles.sin() * magnitude).to(device)

    def _frequencies(self, length: int) -> tuple[Tensor, float]:
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.width
        scaling = self.scaling
        if scaling is None:
            return 1.0 / self.theta**exponent, 1.0
        if scaling.type == "dynamic":
            stretch = max(scaling.factor * length / self.trained_length - (scaling.factor - 1), 1.0)
            return 1.0 / (self.theta * stretch ** (self.width / (self.width - 2))) ** exponent, 1.0
        plain = 1.0 / self.theta**exponent
        if scaling.type == "linear":
            return plain / scaling.factor, 1.0
        if scaling.type == "llama3":
            return self._llama3(plain, scaling), 1.0
        return self._yarn(plain, scaling)

    def _llama3(self, plain: Tensor, scaling: RopeScaling) -> Tensor:
        """Llama 3.1's rule: long wavelengths are divided by the factor, short ones stay, those between are blended."""
        turns = self.trained_length * plain / (2 * math.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) * plain / scaling.factor + blend * plain

    def _yarn(self, plain: Tensor, scaling: RopeScaling) -> tuple[Tensor, float]:
        """YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2 and equation 22)."""

        def dimension(turns: float) -> float:
            log_wavelength = math.log(self.trained_length / (turns * 2 * math.pi))
            return self.width * log_wavelength / (2 * math.log(self.theta))

        low = max(math.floor(dimension(scaling.beta_fast)), 0)
        high = min(math.ceil(dimension(scaling.beta_slow)), self.width - 1)
        index = torch.arange(plain.numel(), dtype=torch.float32)
        interpolated = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
        magnitude = scaling.attention_factor
        if magnitude is None:
            magnitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
        return plain / scaling.factor * interpolated + plain * (1 - interpolated), magnitude
