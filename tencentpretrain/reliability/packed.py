"""D4: documents that share a row are computed as if each stood alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tencentpretrain.data.batch import Batch
from tencentpretrain.model import Model, build_model
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability.layouts import MODELS, VOCAB_SIZE
from tencentpretrain.reliability.row import Row, Scale

_WIDTH = 32
_DOCUMENT = 12
"""Longest document; the positions of the small models end at the row's width."""


@ROWS.register("D4")
def check_packing(scale: Scale, folder: Path) -> Row:
    """Neighbours are replaced one by one, and every document is computed alone as well."""
    rows = 100 if scale == "full" else 5
    draw = random.Random(4)
    changed = compared = 0
    leak = apart = 0.0
    for kind in ("bert", "gpt2", "llama"):
        # Wider weights than at the start of training, so that attention is far from uniform.
        model = build_model(MODELS[kind], VOCAB_SIZE, seed=1, std=0.1).eval()
        for seed in range(rows):
            batch = _row(draw, seed)
            assert isinstance(batch.token_ids, Tensor)
            assert batch.document_ids is not None
            whole = _logits(model, batch)
            for number in range(1, int(batch.document_ids.max()) + 1):
                own = batch.document_ids == number
                other = batch.token_ids.where(own | (batch.document_ids == 0), batch.token_ids % (VOCAB_SIZE - 1) + 1)
                leak = max(leak, float((_logits(model, replace(batch, token_ids=other)) - whole)[own].abs().max()))
                changed += 1
                alone = _logits(model, _alone(batch, own))
                losses = [_losses(logits, batch.token_ids[own]) for logits in (whole[own], alone[0])]
                apart = max(apart, float((losses[0] - losses[1]).abs().max() / losses[1].abs().max().clamp(min=1)))
                compared += losses[0].numel()
    return Row(
        name="D4",
        promised="packed against alone: loss per token within 1e-6 fp32; logits when a neighbour changes: difference 0",
        reached=(
            f"{changed} times all neighbours of a document replaced: largest difference {leak:g}; {compared} tokens "
            f"packed and alone: losses differ by at most {apart:.1e} of the largest"
        ),
        passed=leak == 0.0 and apart <= 1e-6,
    )


def _row(draw: random.Random, seed: int) -> Batch:
    """Returns one row of three or more documents and perhaps padding."""
    documents = torch.zeros(1, _WIDTH, dtype=torch.int64)
    begin = number = 0
    while begin < _WIDTH and (number < 3 or draw.random() < 0.7):
        number, end = number + 1, begin + draw.randint(1, _DOCUMENT)
        documents[0, begin:end] = number
        begin = end
    tokens = torch.randint(1, VOCAB_SIZE, (1, _WIDTH), generator=torch.Generator().manual_seed(seed))
    real = (documents > 0).long()
    return Batch(token_ids=tokens * real, segment_ids=real, document_ids=documents, has_padding=bool((real == 0).any()))


def _alone(batch: Batch, own: Tensor) -> Batch:
    assert isinstance(batch.token_ids, Tensor)
    tokens = batch.token_ids[own][None]
    return Batch(token_ids=tokens, segment_ids=torch.ones_like(tokens), has_padding=False)


def _logits(model: Model, batch: Batch) -> Tensor:
    head = model.target.get_submodule(model.target.names[0])
    with torch.no_grad():
        hidden, _ = model.features(batch)
        logits: Tensor = head.predict(hidden)  # type: ignore[operator]
        return logits


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """The loss of each token if it were its own label."""
    return F.cross_entropy(logits, tokens, reduction="none")
