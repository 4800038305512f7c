"""Samples before they are put into a batch: unpadded arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.integer[Any]]


@dataclass(frozen=True, kw_only=True)
class MaskedExample:
    """Tokens of which some are to be predicted (bert, albert, mlm, cls_mlm).

    Shapes:
        token_ids: (length,) with the masks in it.
        positions, labels: (predicted,) where, and which tokens stood there.

    Attributes:
        segment_ends: where the first, and if there is one the second segment ends.
        label: of the whole sample (sentence order, next sentence, class).
        document_lengths: tokens of each document of the sample that must not see the others; empty: they may.
    """

    token_ids: Ids
    positions: Ids
    labels: Ids
    segment_ends: tuple[int, ...]
    label: int | None = None
    document_lengths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WindowExample:
    """Consecutive tokens: up to seq_length + 1 for language models, up to seq_length for bidirectional ones.

    Attributes:
        document_lengths: as in `MaskedExample`.
    """

    token_ids: Ids
    document_lengths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PairExample:
    """A source and a target, each with its special tokens (mt, gsg, bart, t5)."""

    source_ids: Ids
    target_ids: Ids


@dataclass(frozen=True, kw_only=True)
class PrefixExample:
    """A prompt and its continuation in one sequence; the first `prefix_length` tokens are the prompt."""

    token_ids: Ids
    prefix_length: int


@dataclass(frozen=True, kw_only=True)
class LabelledExample:
    """A text, or two, with a class; `lengths` are those of the segments in `token_ids`."""

    token_ids: Ids
    lengths: tuple[int, ...]
    label: int
