"""Floating-point operations per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.plan.activations import Lengths
from tencentpretrain.plan.parameters import Weight, head_width, tied_head, tied_table

_HEADS = ("target.mlm.", "target.lm.", "target.bilm.")
_POOLED = ("target.sp.", "target.cls.", "target.clr.")


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations per token (source and target tokens alike); a multiplication and an addition are two.

    Fields:
        forward: matrix products of the forward pass, attention included.
        attention: of it the products of queries with keys and of probabilities with values.
        training: forward and backward pass, and the second forward pass where activations are recomputed.
    """

    forward: float
    attention: float
    training: float


def flops_of(config: ModelConfig, weights: Sequence[Weight], lengths: Lengths, *, checkpointing: bool) -> Flops:
    """Counts 2 operations per weight of a matrix and token, and 4 K N D per token and attention over K keys.

    The backward pass takes twice the forward pass (Chowdhery et al. 2022, arXiv:2204.02311, appendix B:
    6 N + 12 L H Q T per token); products with frozen weights take one pass of the two. Causal attention is counted in
    full, as there. The head counts only where a token is predicted.
    """
    source, target = lengths.batch * lengths.source, lengths.batch * lengths.target
    per_weight = _rows_by_weight(config, weights, lengths)
    matrices = sum(2.0 * weight.size * rows for weight, rows in per_weight)
    frozen = sum(2.0 * weight.size * rows for weight, rows in per_weight if not weight.trained)
    attention = 0.0
    for part, length in ((config, source), *((stream, source) for stream in config.streams or ())):
        if part.encoder == "transformer" and part.num_heads and part.streams is None:
            keys = min(lengths.source, part.sliding_window or lengths.source)
            attention += 4.0 * (part.num_layers or 0) * keys * part.num_heads * head_width(part) * length
    if config.decoder is not None and config.num_heads:
        keys = lengths.target + lengths.source
        attention += 4.0 * (config.num_decoder_layers or 0) * keys * config.num_heads * head_width(config) * target
    forward = matrices + attention
    training = 3 * forward - frozen
    if checkpointing:
        training += forward - sum(2.0 * w.size * rows for w, rows in per_weight if w.name.startswith("target."))
    tokens = max(source * (len(config.streams or ()) or 1) + target, 1)
    return Flops(forward=forward / tokens, attention=attention / tokens, training=training / tokens)


def _rows_by_weight(config: ModelConfig, weights: Sequence[Weight], lengths: Lengths) -> list[tuple[Weight, float]]:
    """Returns each matrix with the number of rows that are multiplied by it."""
    source, target = lengths.batch * lengths.source, lengths.batch * lengths.target
    found: list[tuple[Weight, float]] = []
    tied = tied_head(config)
    for weight in weights:
        if not weight.matmul:
            continue
        rows: float = target if weight.part == "decoder" else source
        if ".context_attn.linear_layers.1." in weight.name or ".context_attn.linear_layers.2." in weight.name:
            rows = source
        if weight.name.startswith(_POOLED):
            rows = lengths.batch
        elif weight.name.startswith(_HEADS):
            rows = lengths.predicted * (2 if ".bilm." in weight.name else 1)
        if config.parameter_sharing and weight.name.startswith("encoder.transformer."):
            rows *= config.num_layers or 1
        if config.streams is not None and config.tie_weights and weight.part == "encoder":
            rows *= 2
        found.append((weight, rows))
    if tied is not None:
        word = next(weight for weight in weights if weight.name == tied_table(config))
        found.append((word, lengths.predicted))
    return found
