"""Instances in the form of an old `dataset.pt`, and a reader of such files that runs no code."""

from __future__ import annotations

from typing import Any

import numpy as np

from tencentpretrain.data.examples import Ids, PairExample


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


def decode_pair(instance: Any) -> PairExample:
    """Reads ((source, padding), (target, padding), [source length])."""
    source, target, _ = instance
    return PairExample(source_ids=unpad_instance(source), target_ids=unpad_instance(target))


def encode_pair(example: PairExample, source_length: int, target_length: int) -> Any:
    """Returns the form that `decode_pair` reads."""
    return (
        pad_instance(example.source_ids, source_length),
        pad_instance(example.target_ids, target_length),
        [len(example.source_ids)],
    )
