"""Classification of whole sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.layers.blocks import TapPoint
from tencentpretrain.layers.build import required
from tencentpretrain.layers.pooling import pool
from tencentpretrain.registry import TARGETS
from tencentpretrain.targets.base import LossSum, Target
from tencentpretrain.targets.loss import cross_entropy_sum


@TARGETS.register("cls")
class ClsTarget(Target):
    """Classes from a pooled vector: linear_2(tanh(linear_1 x))."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, pad_id: int = 0) -> None:
        super().__init__()
        hidden_size = required(config.hidden_size, "hidden_size", "target 'cls'")
        self.pooling = config.pooling
        self.pooling_weighting = config.pooling_weighting
        self.linear_1 = nn.Linear(hidden_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, required(config.num_labels, "labels_num", "target 'cls'"))
        self.logits = TapPoint()

    def forward(self, hidden: Tensor, batch: Batch, segment_ids: Tensor) -> dict[str, LossSum]:  # type: ignore[override]
        pooled = pool(hidden, segment_ids, self.pooling, weighting=self.pooling_weighting)
        logits = self.linear_2(torch.tanh(self.linear_1(pooled)))
        return {"cls": cross_entropy_sum(self.logits(logits), batch.labels["cls"])}
