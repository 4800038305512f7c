"""Losses on held-out data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tencentpretrain.data.batch import Batch
from tencentpretrain.engines.base import Engine
from tencentpretrain.model import Model
from tencentpretrain.train.metrics import summarize


@torch.no_grad()
def validate(
    model: Model, batches: list[Batch], engine: Engine, after_batch: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Returns losses, accuracies and perplexity over all batches; each loss is its sum over its count. Collective.

    Nothing random is drawn, so training continues as if it had not taken place. Data ranks take the batches in turn and
    sums are made in the order of batches, so any number of them returns the same bits.

    Args:
        after_batch: is called after each batch of this process.
    """
    model.eval()
    found: dict[str, dict[str, float]] = {}
    for first in range(0, len(batches), engine.data_size):
        own = first + engine.data_rank
        with engine.autocast():  # a rank without a batch left repeats one: forward passes may be collective
            losses = model(batches[min(own, len(batches) - 1)].to(engine.device)).losses
        for name, loss in losses.items():
            values = {"total": float(loss.total), "count": float(loss.count)}
            if loss.correct is not None:
                values["correct"] = float(loss.correct)
            for what, value in values.items():
                by_batch = found.setdefault(f"{what} {name}", dict.fromkeys(map(str, range(len(batches))), 0.0))
                if own < len(batches):
                    by_batch[str(own)] = value
        after_batch()
    sums = {key: sum(engine.sum_over_ranks(by_batch).values()) for key, by_batch in found.items()}
    totals, counts, correct = (
        {key.removeprefix(what): value for key, value in sums.items() if key.startswith(what)}
        for what in ("total ", "count ", "correct ")
    )
    means = {name: total / max(counts[name], 1) for name, total in totals.items()}
    return summarize(
        means,
        {name: int(value) for name, value in correct.items()},
        {name: int(value) for name, value in counts.items()},
    )
