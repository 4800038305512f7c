"""Contrastive learning between two streams (CLIP, Radford et al. 2021, arXiv:2103.00020, figure 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.errors import ConfigError
from tencentpretrain.layers.blocks import TapPoint
from tencentpretrain.layers.build import required
from tencentpretrain.layers.initialization import LOGIT_SCALE
from tencentpretrain.layers.pooling import pool
from tencentpretrain.registry import TARGETS
from tencentpretrain.targets.base import LossSum, Target


class _Gather(torch.autograd.Function):
    """Joins the rows of all processes; the gradient of each row returns to the process that it came from."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        parts = [torch.empty_like(features) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, features.contiguous())
        ctx.first, ctx.rows = torch.distributed.get_rank() * features.size(0), features.size(0)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient[ctx.first : ctx.first + ctx.rows]


def gather(features: Tensor) -> tuple[Tensor, int]:
    """Returns the features of all processes, (B * processes, F), and the row of this process's first one.

    All processes must hold the same number of rows.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return features, 0
    gathered: Tensor = _Gather.apply(features)
    return gathered, torch.distributed.get_rank() * features.size(0)


@TARGETS.register("clr")
class ClrTarget(Target):
    """Each sample's two pooled vectors must find each other among those of the whole batch, over all processes.

    The sum runs over this process's samples, so that sums and counts of all processes add up to those of the batch.
    Right answers are counted from stream 0 to stream 1.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, pad_id: int = 0) -> None:
        super().__init__()
        streams = required(config.streams, "stream_0 and stream_1", "target 'clr'")
        sizes = tuple(required(stream.hidden_size, "hidden_size", "target 'clr'") for stream in streams)
        self.pooling = tuple(stream.pooling for stream in streams)
        self.pooling_weighting = config.pooling_weighting
        self.encoder_0_projection: nn.Parameter | None = None
        self.encoder_1_projection: nn.Parameter | None = None
        if config.projection:
            feature_size = required(config.feature_size, "feature_size", "target 'clr' with projection")
            self.encoder_0_projection = nn.Parameter(torch.randn(sizes[0], feature_size) * sizes[0] ** -0.5)
            self.encoder_1_projection = nn.Parameter(torch.randn(sizes[1], feature_size) * sizes[1] ** -0.5)
        elif sizes[0] != sizes[1]:
            raise ConfigError(
                f"target 'clr' without projection needs streams of one hidden_size, but they have "
                f"{sizes[0]} and {sizes[1]}"
            )
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.logits = TapPoint()

    def forward(  # type: ignore[override]
        self, hidden: tuple[Tensor, Tensor], batch: Batch, segment_ids: tuple[Tensor, Tensor]
    ) -> dict[str, LossSum]:
        first, second = (
            pool(stream, segments, pooling, weighting=self.pooling_weighting)
            for stream, segments, pooling in zip(hidden, segment_ids, self.pooling, strict=True)
        )
        if self.encoder_0_projection is not None and self.encoder_1_projection is not None:
            first, second = first @ self.encoder_0_projection, second @ self.encoder_1_projection
        first, second = F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)
        all_first, start = gather(first)
        all_second, _ = gather(second)
        scale = self.logit_scale.float().exp()
        logits = self.logits(scale * first @ all_second.t())
        back = scale * second @ all_first.t()
        labels = torch.arange(start, start + first.size(0), device=first.device)
        total = (F.cross_entropy(logits, labels, reduction="sum") + F.cross_entropy(back, labels, reduction="sum")) / 2
        correct = (logits.argmax(dim=-1) == labels).sum()
        count = torch.tensor(first.size(0), device=first.device)
        return {"clr": LossSum(total=total, count=count, correct=correct)}
