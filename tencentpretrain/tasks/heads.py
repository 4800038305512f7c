"""Heads that sit on a pre-trained body, and the model the two make."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tencentpretrain.data.batch import Batch, Stream
from tencentpretrain.layers.pooling import pool

if TYPE_CHECKING:
    from tencentpretrain.config.model import ModelConfig
    from tencentpretrain.model import Model


class ClassificationHead(nn.Module):
    """Pools a sequence and maps it to logits through one hidden layer with tanh.

    Shapes:
        hidden: (B, S, H); segment_ids: (B, S).
        returns: (B, labels).
    """

    def __init__(self, config: ModelConfig, num_labels: int) -> None:
        super().__init__()
        assert config.hidden_size is not None
        self.pooling = config.pooling
        self.weighting = config.pooling_weighting
        self.output_layer_1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.output_layer_2 = nn.Linear(config.hidden_size, num_labels)

    def forward(self, hidden: Tensor, segment_ids: Tensor) -> Tensor:
        """Returns the logits."""
        pooled = pool(hidden, segment_ids, self.pooling, weighting=self.weighting)
        logits: Tensor = self.output_layer_2(torch.tanh(self.output_layer_1(pooled)))
        return logits


class TaskModel(nn.Module):
    """A body and a head under the published tensor names: embedding.*, encoder.*, then the head's own."""

    def __init__(self, body: Model, head: nn.Module) -> None:
        super().__init__()
        for part in (body, head):
            for name, child in part.named_children():
                if name != "target":
                    self.add_module(name, child)
        # in a tuple, so that the tensors are not registered a second time under longer names
        self._parts: tuple[Model, nn.Module] = (body, head)

    def train(self, mode: bool = True) -> TaskModel:
        """Switches dropout in body and head."""
        for part in self._parts:
            part.train(mode)
        super().train(mode)
        return self

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Makes every transformer layer recompute its activations in the backward pass, or stops it."""
        self._parts[0].set_gradient_checkpointing(enabled)

    def features(self, batch: Batch) -> tuple[Stream, Stream]:
        """Returns hidden states and segment ids, before the head."""
        return self._parts[0].features(batch)

    def forward(self, batch: Batch) -> Tensor:
        """Returns the head's logits."""
        hidden, segment_ids = self.features(batch)
        logits: Tensor = self._parts[1](hidden, segment_ids)
        return logits
