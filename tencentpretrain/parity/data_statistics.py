"""Checks the random choices of data processors against recorded statistics."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tencentpretrain.data.examples import Ids, MaskedExample, PairExample
from tencentpretrain.data.masking import span_length_law
from tencentpretrain.data.random import SAMPLE, KeyedGenerator
from tencentpretrain.errors import TencentPretrainError
from tencentpretrain.parity.base import CaseResult
from tencentpretrain.parity.data import Prepared, prepare
from tencentpretrain.registry import PROCESSORS

SEEDS = (7, 8, 9)
_EXACT = ("masking.exactly_max(1,round(0.15*len))", "masking.predicted_at_cls_sep_pad", "same_token_multiset")
_EXACT_IN = (
    "bert",
    "bert_short_seq_prob_0.5",
    "bert_small_docs_buffer",
    "bert_dynamic_masking",
    "albert",
    "mlm_full_sentences",
    "cls_mlm",
    "bart_no_span",
    "bart_span_0.3_3",
)

CORRECTED: dict[str, dict[str, str]] = {
    "*": {
        "masking.random_id_min": "random replacements are ordinary tokens only",
        "masking.random_id_max": "random replacements are ordinary tokens only",
    },
    "t5": {
        "pad_inside_seg.mean": "segments end where the shortened source ends",
        "seg_length(un-shortened).mean": "segments end where the shortened source ends",
    },
    "gsg_lead": {"instances": "the last document is not lost"},
    "bart": {
        "instances": "no empty samples, and the last document is not lost",
        "samples": "the recorded ones are a part of the epoch",
    },
    "mlm_full_sentences": {"instances": "each pass holds the corpus once, not 1 + 2 + 3 times"},
    "bert_whole_word_masking": {
        "masking.run_length": "words are those of the token ids, not of a Chinese segmenter",
        "masking.exactly_max(1,round(0.15*len))": "words are those of the token ids, not of a Chinese segmenter",
        "masking.predicted_over_tokens": "words are those of the token ids, not of a Chinese segmenter",
        "masking.predicted_fraction_per_instance": "words are those of the token ids, not of a Chinese segmenter",
        "masking.relative_position_mean": "token ids are kept, where they were cut into words and tokenised again",
    },
}
"""Statistics that a stated correction must move, by record entry and beginning of their key."""


class Tally(dict[str, tuple[float, float]]):
    """Our statistics: value and how many things were counted, by the recorded keys."""

    def rate(self, key: str, hits: float, count: float) -> None:
        """Adds a share."""
        self[key] = (hits / max(count, 1), count)

    def mean(self, key: str, values: list[float] | NDArray[Any]) -> None:
        """Adds a mean."""
        self[f"{key}.mean"] = (float(np.mean(values)), len(values))

    def histogram(self, key: str, values: list[int]) -> None:
        """Adds the share of each value."""
        for value, count in zip(*np.unique(values, return_counts=True), strict=True):
            self[f"{key}.{value}"] = (count / len(values), len(values))


def check_statistics(path: Path, record: dict[str, Any], vocabularies: Path) -> list[CaseResult]:
    """Compares the statistics of every entry; ours are means over three seeds.

    A statistic agrees within four of its standard errors or twice its range over the recorded seeds, whichever is
    larger.
    """
    results = []
    for name, entry in record["processors"].items():
        try:
            results.append(_check_entry(path, name, entry, vocabularies))
        except TencentPretrainError as error:
            results.append(CaseResult(name=f"{path.stem}.{name}", passed=False, deviation=math.nan, detail=str(error)))
    return [*results, *(_check_span_law(path.stem, *law) for law in record.get("get_span_len", {}).items())]


def _check_span_law(stem: str, name: str, drawn: dict[str, Any]) -> CaseResult:
    """Compares the law of span lengths with the recorded shares of its draws."""
    settings = dict(part.split("=") for part in name.split(","))
    law = span_length_law(float(settings["span_geo_prob"]), int(settings["span_max_length"]))
    worst = max(
        abs(share - drawn["hist"].get(str(length), 0.0)) / (4 * math.sqrt(share * (1 - share) / drawn["n"]))
        for length, share in enumerate(law.tolist(), start=1)
    )
    detail = f"worst {worst:.2f} of four standard errors"
    return CaseResult(name=f"{stem}.get_span_len({name})", passed=worst <= 1, deviation=worst, detail=detail)


def _check_entry(path: Path, name: str, entry: dict[str, Any], vocabularies: Path) -> CaseResult:
    processor = next(known for known in sorted(PROCESSORS.names(), key=len, reverse=True) if name.startswith(known))
    corpus = "cls_2000.tsv" if processor == "cls_mlm" else "docs_1mb.txt"
    with tempfile.TemporaryDirectory() as folder:
        source = path.parent / "corpora" / corpus
        prepared = prepare(processor, entry["flags"], source, vocabularies, Path(folder))
        spans = entry["flags"].get("span_masking")
        manner = "in the recorded manner, in which spans run over separators; " if spans else ""
        tallies = [_tally(_with_seed(prepared, seed), entry["flags"]) for seed in SEEDS]
    worst, wrong, moved = 0.0, [], []
    compared = 0
    for key, (low, high) in entry["over_seeds"].items():
        reason = _correction(name, key)
        recorded, error = _recorded(entry["seed_7"], key)
        ours = float(np.mean([tally.get(key, (0.0, 0.0))[0] for tally in tallies]))
        is_share = any(part in key for part in (".run_length", "_hist", "span_length_in_tgt"))
        if reason is None and not is_share and all(key not in tally for tally in tallies):
            wrong.append(f"{key} is not computed")
            continue
        count = max(tally.get(key, (0.0, 0.0))[1] for tally in tallies)
        if error is None:
            spread = max(recorded * (1 - recorded), 0.0) if count else 0.0
            error = math.sqrt(spread / count) if count else 1 / math.sqrt(3000) * 0.02
        allowed = max(4 * error, 2 * (high - low), 1e-9)
        if key in _EXACT and name in _EXACT_IN:
            allowed = 1e-9
        if reason is not None:
            moved.append(f"{key} {ours:.4g} for {recorded:.4g} ({reason})")
            continue
        compared += 1
        worst = max(worst, abs(ours - recorded) / allowed)
        if abs(ours - recorded) > allowed:
            wrong.append(f"{key} {ours:.5g}, recorded {recorded:.5g} +- {allowed:.2g}")
    detail = manner + "; ".join([f"{compared} statistics, worst {worst:.2f} of what is allowed", *wrong, *moved])
    return CaseResult(name=f"{path.stem}.{name}", passed=not wrong, deviation=worst, detail=detail)


def _correction(name: str, key: str) -> str | None:
    known = {
        key: reason
        for entry in CORRECTED
        if name.startswith(entry) or entry == "*"
        for key, reason in CORRECTED[entry].items()
    }
    return next((reason for start, reason in known.items() if key.startswith(start)), None)


def _recorded(statistics: dict[str, Any], key: str) -> tuple[float, float | None]:
    """Returns a recorded value and its standard error, if one is recorded."""
    node: Any = statistics
    parent: Any = {}
    rest = key
    while rest:  # keys have dots of their own
        part = next((child for child in node if rest == child or rest.startswith(child + ".")), None)
        if part is None:
            return 0.0, None
        parent, node, rest = node, node[part], rest[len(part) + 1 :]
    if isinstance(node, dict):
        return float(node["rate"]), float(node["stderr"])
    if key.endswith(".mean"):
        return float(node), float(parent["sem"])
    return float(node), None


def _with_seed(prepared: Prepared, seed: int) -> Prepared:
    data = prepared.processor.data.model_copy(update={"seed": seed})
    processor: Any = type(prepared.processor)(data, prepared.tokenizer)
    if data.span_masking:
        processor.masker.spans_stop_at_special = False
    return Prepared(prepared.store, processor, prepared.tokenizer)


def _tally(prepared: Prepared, flags: dict[str, Any]) -> Tally:
    name = prepared.processor.data.data_processor
    passes = range(1 if flags.get("dynamic_masking") else flags.get("dup_factor", 5))
    if name == "cls_mlm":
        passes = range(1)
    examples = [example for epoch in passes for example in prepared.examples(epoch)]
    tally = Tally()
    tally["instances"] = (len(examples), 0)
    if name in ("bert", "albert"):
        tally["documents"] = (len(prepared.store), 0)
        tally["instances_per_document_per_dup"] = (len(examples) / len(prepared.store) / len(passes), 0)
    kinds: dict[str, Callable[[], None]] = {
        "t5": lambda: _tally_t5(tally, prepared, examples),
        "gsg": lambda: _tally_gsg(tally, prepared, examples, len(passes)),
        "bart": lambda: _tally_bart(tally, prepared, examples, len(passes)),
    }
    kinds.get(name, lambda: _tally_masked(tally, prepared, examples))()
    return tally


def _tally_masked(tally: Tally, prepared: Prepared, examples: list[MaskedExample]) -> None:
    data, length = prepared.processor.data, np.array([len(example.token_ids) for example in examples])
    tally.mean("length", length)
    tally.rate("fraction_full_length(pad_num==0)", int((length == data.seq_length).sum()), len(length))
    tally.rate("fraction_length<seq/2", int((length < data.seq_length / 2).sum()), len(length))
    if data.data_processor in ("bert", "albert"):
        a = np.array([example.segment_ends[0] - 2 for example in examples])
        b = np.array([example.segment_ends[1] - example.segment_ends[0] - 1 for example in examples])
        label = sum(example.label or 0 for example in examples)
        tally.rate("is_random_next" if data.data_processor == "bert" else "is_wrong_order", label, len(examples))
        for key, tokens in (("tokens_a", a), ("tokens_b", b)):
            tally.mean(key, tokens)
            tally.rate(f"{key}_empty", int((tokens == 0).sum()), len(tokens))
    elif data.data_processor == "cls_mlm":
        tally.mean("label_mean", [example.label or 0 for example in examples])
    _tally_masks(tally, prepared, examples, length)


def _tally_masks(tally: Tally, prepared: Prepared, examples: list[MaskedExample], length: NDArray[Any]) -> None:
    tokenizer = prepared.tokenizer
    predicted = np.array([len(example.positions) for example in examples])
    tally.rate("masking.predicted_over_tokens", int(predicted.sum()), int(length.sum()))
    tally.mean("masking.predicted_fraction_per_instance", predicted / length)
    budget = np.array([max(1, round(0.15 * int(size))) for size in length])
    tally.rate("masking.exactly_max(1,round(0.15*len))", int((predicted == budget).sum()), len(length))
    new = np.concatenate([example.token_ids[example.positions] for example in examples])
    old = np.concatenate([example.labels for example in examples])
    masked, kept = new == tokenizer.mask_id, new == old
    tally.rate("masking.replaced_by_mask", int(masked.sum()), len(new))
    tally.rate("masking.kept", int(kept.sum()), len(new))
    tally.rate("masking.replaced_by_random", int((~masked & ~kept).sum()), len(new))
    special = [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id]
    tally["masking.predicted_at_cls_sep_pad"] = (int(np.isin(old, special).sum()), 0)
    drawn = new[~masked & ~kept]
    tally["masking.random_is_special(cls,sep,pad,mask)"] = (int(np.isin(drawn, [*special, tokenizer.mask_id]).sum()), 0)
    tally["masking.random_id_min"] = (int(drawn.min()), 0)
    tally["masking.random_id_max"] = (int(drawn.max()), 0)
    tally.mean(
        "masking.relative_position_mean",
        np.concatenate([example.positions / max(len(example.token_ids) - 1, 1) for example in examples]),
    )
    runs = [size for example in examples for size in _runs(example.positions)]
    tally.histogram("masking.run_length_of_adjacent_predictions", runs)


def _runs(positions: Ids) -> list[int]:
    if not len(positions):
        return []
    starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    return np.diff(np.append(starts, len(positions))).tolist()  # type: ignore[no-any-return]


def _tally_t5(tally: Tally, prepared: Prepared, examples: list[PairExample]) -> None:
    first = prepared.tokenizer.sentinel_id or 0
    last = first + prepared.tokenizer.num_sentinels

    def sentinels(ids: Ids) -> Ids:
        return np.flatnonzero((ids >= first) & (ids < last))

    in_source = [len(sentinels(example.source_ids)) for example in examples]
    in_target = [len(sentinels(example.target_ids)) for example in examples]
    spans = [np.diff(sentinels(example.target_ids)) - 1 for example in examples]
    whole = [
        len(example.source_ids) - count + int(span.sum())
        for example, count, span in zip(examples, in_source, spans, strict=True)
    ]
    tally["samples"] = (len(examples), 0)
    tally.mean("pad_inside_seg", _padding_in_segments(prepared, examples))
    tally.mean("seg_length(un-shortened)", [len(example.source_ids) for example in examples])
    tally.mean("sentinels_in_src", np.array(in_source))
    tally.histogram("sentinels_in_src_hist", in_source)
    tally.mean("src_nonpad_length", [len(example.source_ids) for example in examples])
    tally.mean("tgt_in_length", [len(example.target_ids) for example in examples])
    tally.mean("sentinels_in_tgt_minus_src", np.array(in_target) - np.array(in_source))
    lengths = np.concatenate(spans).tolist()
    tally.histogram("span_length_in_tgt", lengths)
    tally["span_length_mean"] = (float(np.mean(lengths)), 0)
    tally.mean("masked_tokens_over_seg_length", [int(s.sum()) / w for s, w in zip(spans, whole, strict=True)])


def _padding_in_segments(prepared: Prepared, examples: list[PairExample]) -> NDArray[Any]:
    """Counts the padding that segment ids declare to be text, per sample."""
    counts = []
    for begin in range(0, len(examples), 64):
        arrays = prepared.processor.arrays(examples[begin : begin + 64])
        counts.append(((arrays.segment_ids > 0) & (arrays.token_ids == prepared.tokenizer.pad_id)).sum(axis=1))
    return np.concatenate(counts)


def _tally_gsg(tally: Tally, prepared: Prepared, examples: list[PairExample], passes: int) -> None:
    masks = np.array([int((example.source_ids == prepared.tokenizer.mask_id).sum()) for example in examples])
    source = np.array([len(example.source_ids) for example in examples])
    target = np.array([len(example.target_ids) for example in examples])
    tally["documents"] = (len(prepared.store), 0)
    tally["instances_per_document_per_dup"] = (len(examples) / len(prepared.store) / passes, 0)
    tally.mean("src_length", source)
    tally.mean("tgt_length", target)
    tally.mean("mask_tokens_in_src", masks)
    tally.mean("tgt_over_total", (target - 2) / (target - 2 + source - 2 - masks))


def _tally_bart(tally: Tally, prepared: Prepared, examples: list[PairExample], passes: int) -> None:
    processor: Any = prepared.processor
    store, tokenizer = prepared.store, prepared.tokenizer
    plan = processor.plan(store, 0)
    generator = KeyedGenerator(processor.data.seed, SAMPLE)
    pairs = [processor.shuffled(store, plan, index, generator.at(0, index)) for index in range(len(plan))]
    unchanged = sum(np.array_equal(source, target) for source, target in pairs)
    same = sum(np.array_equal(np.sort(source), np.sort(target)) for source, target in pairs)
    tally["documents"] = (len(store), 0)
    tally["instances_per_document_per_dup"] = (len(examples) / len(store) / passes, 0)
    tally.mean("instance_length", [len(target) for _, target in pairs])
    tally.rate("order_unchanged_after_sentence_shuffle", unchanged, len(pairs))
    tally.rate("same_token_multiset", same, len(pairs))
    source = np.array([len(example.source_ids) for example in examples])
    target = np.array([min(len(example.target_ids), processor.data.seq_length - 1) for example in examples])
    masks = np.array([int((example.source_ids == tokenizer.mask_id).sum()) for example in examples])
    tally.mean("pad_inside_seg", _padding_in_segments(prepared, examples))
    tally.mean("mask_tokens_in_src(after merging)", masks)
    tally.mean("src_nonpad_length", source)
    tally.mean("seg_length", source)
    tally.mean("tgt_seg_length", target)
    tally.mean("mask_tokens_over_tgt_length", masks / target)
