"""Instances in the form of an old `dataset.pt`, and a reader of such files that runs no code."""

from __future__ import annotations

from typing import Any

import numpy as np

from tencentpretrain.data.examples import Ids


def pad_instance(ids: Ids, length: int) -> tuple[list[int], int]:
    """Returns ids and the number of padding tokens behind them, as old instances hold them."""
    return ids.tolist(), max(length - len(ids), 0)


def unpad_instance(padded: Any) -> Ids:
    """Returns the ids of the pair (ids, number of padding tokens)."""
    ids, padding = padded
    if not isinstance(padding, int):
        raise TypeError("the number of padding tokens is not an integer")
    return np.array(ids, np.int64)


def apply_labels(pairs: Any) -> tuple[Ids, Ids]:
    """Splits pairs (position, original id) into two arrays."""
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]
