"""Losses on held-out data."""

from __future__ import annotations

from typing import Any

import torch

from tencentpretrain.data.batch import Batch
from tencentpretrain.engines.base import Engine
from tencentpretrain.model import Model
from tencentpretrain.train.metrics import summarize


@torch.no_grad()
def validate(model: Model, batches: list[Batch], engine: Engine) -> dict[str, Any]:
    """Returns losses, accuracies and perplexity over all batches; each loss is its sum over its count.

    Nothing random is drawn, so training continues as if it had not taken place.
    """
    model.eval()
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    correct: dict[str, int] = {}
    for batch in batches:
        with engine.autocast():
            losses = model(batch.to(engine.device)).losses
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0.0) + float(loss.total)
            counts[name] = counts.get(name, 0) + int(loss.count)
            if loss.correct is not None:
                correct[name] = correct.get(name, 0) + int(loss.correct)
    means = {name: total / max(counts[name], 1) for name, total in totals.items()}
    return summarize(means, correct, counts)
