"""Names that older files use for tensors, and the names they have now: one table."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

_EMBEDDING = r"(?P<part>(?:tgt_)?embedding(?:\.dual\.embedding_[01])?)"
_ENCODER = r"(?P<part>encoder(?:\.encoder_[01])?)"
_BIAS = "relative_pos_emb.relative_attention_bias.weight"


@dataclass(frozen=True)
class Rename:
    """One rule: names that match `old` wholly are called `new`; with no `new`, the tensor is not read at all."""

    old: str
    new: str | None
    reason: str


RENAMES: tuple[Rename, ...] = (
    Rename(r"target\.embedding\.(?P<rest>.+)", r"tgt_embedding.\g<rest>", "target embedding inside the old target"),
    Rename(r"target\.decoder\.(?P<rest>.+)", r"decoder.\g<rest>", "decoder inside the old target"),
    Rename(
        r"embedding\.(?P<rest>(?:embedding_[01]|stream_[01]_layer_norm)\..+)",
        r"embedding.dual.\g<rest>",
        "short names of siamese models",
    ),
    Rename(_EMBEDDING + r"\.word_embedding\.weight", r"\g<part>.word.embedding.weight", "old embedding"),
    Rename(_EMBEDDING + r"\.position_embedding\.weight", r"\g<part>.pos.embedding.weight", "old embedding"),
    Rename(_EMBEDDING + r"\.segment_embedding\.weight", r"\g<part>.seg.embedding.weight", "old embedding"),
    Rename(_EMBEDDING + r"\.(?:sinusoidalpos\.)?pe", None, "the table of sinusoids is computed"),
    Rename(r"target\.mlm_linear_(?P<n>[12])\.(?P<rest>\w+)", r"target.mlm.linear_\g<n>.\g<rest>", "old mlm head"),
    Rename(r"target\.layer_norm\.(?P<rest>\w+)", r"target.mlm.layer_norm.\g<rest>", "old mlm or prompt head"),
    Rename(
        r"target\.(?:sp|nsp|sop)_linear_(?P<n>[12])\.(?P<rest>\w+)", r"target.sp.linear_\g<n>.\g<rest>", "old sp head"
    ),
    Rename(r"target\.output_layer\.(?P<rest>\w+)", r"target.lm.output_layer.\g<rest>", "old lm head"),
    Rename(r"target\.linear_(?P<n>[12])\.(?P<rest>\w+)", r"target.mlm.linear_\g<n>.\g<rest>", "prompt or cloze head"),
)
"""Applied from top to bottom, each at most once, to every name that the model does not know."""

_BLOCK_BIAS = re.compile(_ENCODER + r"\.transformer(?:\.(?P<layer>\d+))?\." + re.escape(_BIAS))
_ENCODER_BIAS = re.compile(_ENCODER + r"\." + re.escape(_BIAS))


@dataclass(frozen=True, kw_only=True)
class Migration:
    """Where each tensor is found in a file.

    Fields:
        sources: name now -> name in the file, for every tensor that is read.
        renamed: name in the file -> name now, where the two differ.
        dropped: name in the file -> why it is not read.
    """

    sources: Mapping[str, str]
    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)


def current_name(name: str, known: Collection[str] | None = None) -> tuple[str | None, str]:
    """Returns what a tensor is called now (None: it is not read) and the reason.

    A name in `known` is current already. Where `known` is given, a rename that leads to no known name is not made, so
    that reports speak of the names that stand in the file.
    """
    if known is not None and name in known:
        return name, ""
    new, reasons = name, []
    for rule in RENAMES:
        match = re.fullmatch(rule.old, new)
        if match:
            if rule.new is None:
                return None, rule.reason
            new = match.expand(rule.new)
            reasons.append(rule.reason)
    if known is not None and new not in known:
        return name, ""
    return new, ", ".join(reasons)


def migrate(names: Collection[str], known: Collection[str] | None = None) -> Migration:
    """Finds the current name of each tensor of a file.

    Args:
        names: names in the file.
        known: names in the model; None gives the current names for a conversion without a model.
    """
    sources: dict[str, str] = {}
    renamed: dict[str, str] = {}
    dropped: dict[str, str] = {}
    bias_sources, bias_dropped = _relative_bias(names, known)
    for name in names:
        if name in bias_dropped:
            dropped[name] = bias_dropped[name]
            continue
        new, reason = (bias_sources[name], "") if name in bias_sources else current_name(name, known)
        if new is None:
            dropped[name] = reason
        elif new != name and new in names and new not in bias_dropped:
            dropped[name] = f"the file also holds {new}"
        elif new in sources:
            dropped[name] = f"{sources[new]} is read for {new}"
        else:
            sources[new] = name
            if new != name:
                renamed[name] = new
    return Migration(sources=sources, renamed=renamed, dropped=dropped)


def _relative_bias(names: Collection[str], known: Collection[str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """Chooses among the places where T5 files keep the encoder's position bias.

    Per-block copies are the table that was used in training where they exist; the table of the encoder beside them was
    never used. Files without copies hold the table at the encoder.
    """
    sources: dict[str, str] = {}
    dropped: dict[str, str] = {}
    blocks: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = _BLOCK_BIAS.fullmatch(name)
        if match and (known is None or name not in known):
            blocks.setdefault(match["part"], []).append((int(match["layer"] or 0), name))
    for part, copies in blocks.items():
        target = f"{part}.{_BIAS}"
        if known is not None and target not in known:
            continue
        copies.sort()
        sources[copies[0][1]] = target
        for _, name in copies[1:]:
            dropped[name] = f"a copy of {copies[0][1]}"
    for name in names:
        match = _ENCODER_BIAS.fullmatch(name)
        if match and name in sources.values():
            dropped[name] = "the table of the blocks is the one that was trained"
    return sources, dropped
