"""Text infilling (Lewis et al., 2020, section 2.2)."""

from __future__ import annotations

import numpy as np

from tencentpretrain.data.examples import Ids

INFILLED_SHARE = 0.3
MEAN_SPAN = 3.0


def infill(token_ids: Ids, mask_id: int, rng: np.random.Generator) -> Ids:
    """Replaces spans of Poisson(3) tokens, 30 % of all tokens, by one mask each; a span of length 0 inserts a mask.

    Spans do not touch each other, so that the number of masks is the number of spans.

    Shapes:
        token_ids: (length,) without special tokens.
        returns: the corrupted tokens.
    """
    budget = round(INFILLED_SHARE * len(token_ids))
    if budget == 0:
        return token_ids.astype(np.int64)
    drawn = rng.poisson(MEAN_SPAN, size=2 * budget + 8)
    count = int(np.searchsorted(np.cumsum(drawn), budget)) + 1
    lengths = drawn[:count].copy()
    lengths[-1] -= max(int(lengths.sum()) - budget, 0)
    kept = len(token_ids) - int(lengths.sum())
    lengths = lengths[: kept + 1]
    kept = len(token_ids) - int(lengths.sum())
    # A span stands before one of the kept tokens, or at the end: distinct gaps keep the spans apart.
    gaps = np.sort(rng.permutation(kept + 1)[: len(lengths)])
    lengths = rng.permutation(lengths)
    removed_before = np.cumsum(lengths) - lengths
    starts = gaps + removed_before
    keep = np.ones(len(token_ids), bool)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        keep[start : start + length] = False
    result: Ids = np.insert(token_ids[keep].astype(np.int64), gaps, mask_id)
    return result
