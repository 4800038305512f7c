"""Sentence prediction: next sentence (BERT, arXiv:1810.04805), sentence order (ALBERT), image and text match (ViLT)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.layers.blocks import TapPoint
from tencentpretrain.layers.build import required
from tencentpretrain.registry import TARGETS
from tencentpretrain.targets.base import LossSum, Target
from tencentpretrain.targets.loss import cross_entropy_sum


@TARGETS.register("sp")
class SpTarget(Target):
    """Two classes from the first position: linear_2(tanh(linear_1 x))."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, pad_id: int = 0) -> None:
        super().__init__()
        hidden_size = required(config.hidden_size, "hidden_size", "target 'sp'")
        self.linear_1 = nn.Linear(hidden_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, 2)
        self.logits = TapPoint()

    def forward(self, hidden: Tensor, batch: Batch, segment_ids: Tensor) -> dict[str, LossSum]:  # type: ignore[override]
        logits = self.linear_2(torch.tanh(self.linear_1(hidden[:, 0])))
        return {"sp": cross_entropy_sum(self.logits(logits), batch.labels["sp"])}
