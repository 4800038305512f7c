"""How many labels a batch has for each loss, known before the forward pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import IGNORE_LABEL, Batch

_SEQUENCE_LOSSES = ("lm", "bilm_forward", "bilm_backward")


def count_labels(batches: Iterable[Batch], config: ModelConfig) -> dict[str, int]:
    """Returns for each loss of the model how many labels all batches together have.

    These are the counts that the targets return with their sums. A step needs them before its first backward pass to
    divide every micro-batch by the same number.
    """
    totals: dict[str, int] = {}
    for batch in batches:
        for name, count in _count(batch, config).items():
            totals[name] = totals.get(name, 0) + count
    return totals


def _count(batch: Batch, config: ModelConfig) -> dict[str, int]:
    counts = {name: _count_one(name, labels, batch, config) for name, labels in batch.labels.items()}
    if "clr" in config.target:
        counts["clr"] = batch.size
    return counts


def _count_one(name: str, labels: Tensor, batch: Batch, config: ModelConfig) -> int:
    if name == "mlm":
        return int(torch.count_nonzero(labels > 0))
    counted = labels != IGNORE_LABEL
    if name in _SEQUENCE_LOSSES:
        segments = batch.segment_ids if batch.decoder_segment_ids is None else batch.decoder_segment_ids
        assert isinstance(segments, Tensor)
        counted = counted & (segments >= (2 if name == "lm" and config.prefix_lm_loss else 1))
    return int(torch.count_nonzero(counted))
