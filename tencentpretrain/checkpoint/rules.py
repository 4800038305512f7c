"""Reshapes of one tensor between a Hugging Face model and ours, each with its inverse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.layers.build import head_width


@dataclass(frozen=True)
class Rule(ABC):
    """How one tensor of theirs is written as one or more of ours, and back without loss.

    Fields:
        ours: templates of our names, such as "encoder.transformer.{i}.layer_norm_1.{n}".
        theirs: the template of their name, with the same placeholders.
    """

    ours: tuple[str, ...]
    theirs: str

    @abstractmethod
    def read(self, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        """Returns one tensor for each name of ours."""

    @abstractmethod
    def write(self, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
        """Returns their tensor: the inverse of `read`."""


class Rename(Rule):
    """The same tensor under another name."""

    def read(self, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return (tensor,)

    def write(self, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
        return tensors[0]


class Transpose(Rule):
    """A matrix that is stored input-first on their side; cut by rows into as many parts as there are names of ours."""

    def read(self, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return _cut(tensor.t(), len(self.ours))

    def write(self, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
        return torch.cat(list(tensors)).t().contiguous()


class Chunk(Rule):
    """One tensor of theirs that holds several of ours, row after row."""

    def read(self, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return _cut(tensor, len(self.ours))

    def write(self, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
        return torch.cat(list(tensors))


class SqueezeRow(Rule):
    """A vector that is stored as a matrix of one row on their side."""

    def read(self, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return (tensor.squeeze(0),)

    def write(self, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
        return tensors[0].unsqueeze(0)


@dataclass(frozen=True)
class PadRows(Rule):
    """A table with `first` rows of zeros in front on our side, which theirs does not have."""

    first: int

    def read(self, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return (torch.cat([tensor.new_zeros(self.first, tensor.size(1)), tensor]),)

    def write(self, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
        return tensors[0][self.first :].contiguous()


@dataclass(frozen=True)
class DropRows(Rule):
    """A table whose `first` rows on their side are never looked up; they come back as zeros."""

    first: int

    def read(self, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return (tensor[self.first :].contiguous(),)

    def write(self, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
        return torch.cat([tensors[0].new_zeros(self.first, tensors[0].size(1)), tensors[0]])


class Interleave(Rule):
    """Query and key rows for rotary positions: theirs rotates halves of a head, ours neighbours.

    Within each head our row 2k + c is their row c * head_dim / 2 + k, for c in {0, 1}. Serves weights
    (heads * head_dim, H), biases (heads * head_dim) and the norm of one head (head_dim) alike.
    """

    def read(self, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return (_swap(tensor, (-1, 2, head_width(config) // 2)),)

    def write(self, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
        return _swap(tensors[0], (-1, head_width(config) // 2, 2))


def _cut(tensor: Tensor, parts: int) -> list[Tensor]:
    """Cuts the rows into equal parts."""
    return [part.contiguous() for part in tensor.reshape(parts, -1, *tensor.shape[1:])]


def _swap(tensor: Tensor, axes: tuple[int, int, int]) -> Tensor:
    """Cuts the rows into three axes, swaps the last two of them and joins them again."""
    return tensor.reshape(*axes, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
