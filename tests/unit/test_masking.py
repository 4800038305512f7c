"""Masks: how many, where, and what stands in their place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_samples import SENTINELS, WORDS, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.infilling import infill
from tencentpretrain.data.masking import Masker, span_length_law

CLS, SEP, MASK = 2, 3, 4


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabulary")


def masker(folder: Path, **flags: object) -> Masker:
    return Masker(DataConfig.model_validate(flags), tokenizer_of(folder)())


def test_span_law_is_the_truncated_geometric_one() -> None:
    law = span_length_law(0.2, 10)
    assert (law * np.arange(1, 11)).sum() == pytest.approx(3.797, abs=5e-3)
    assert law[[0, 1, 2, 9]] == pytest.approx([0.224, 0.179, 0.143, 0.030], abs=5e-4)
    assert law.sum() == pytest.approx(1)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["", "span_masking", "whole_word_masking"]),
)
def test_any_mask_keeps_the_rules(vocabulary: Path, lengths: list[int], seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    parts = [np.append(rng.integers(5, 5 + len(WORDS), size=length), SEP) for length in lengths]
    ids = np.concatenate([[CLS], *parts])
    masked, positions, labels = masker(vocabulary, **({kind: True} if kind else {})).mask(ids, rng)
    assert np.array_equal(ids[positions], labels)
    assert np.array_equal(np.delete(masked, positions), np.delete(ids, positions))
    assert not np.isin(labels, [CLS, SEP]).any()
    assert (np.diff(positions) > 0).all()
    budget = max(1, round(0.15 * len(ids)))
    assert len(positions) <= budget
    if kind != "span_masking":
        assert len(positions) == min(budget, sum(lengths))
    changed = masked[masked != ids]
    assert np.isin(changed, [MASK, *range(5, 5 + len(WORDS))]).all()


def test_shares_of_mask_random_and_kept(vocabulary: Path) -> None:
    rng = np.random.default_rng(1)
    ids = np.concatenate([[CLS], rng.integers(5, 65, size=20_000), [SEP]])
    masked, positions, labels = masker(vocabulary).mask(ids, rng)
    count = len(positions)
    for share, expected in (
        ((masked[positions] == MASK).mean(), 0.8),
        ((masked[positions] == labels).mean(), 0.1 + 0.1 / 60),
    ):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / count)


def test_a_span_has_one_fate_and_stops_at_separators(vocabulary: Path) -> None:
    drawn = masker(vocabulary, span_masking=True)
    rng = np.random.default_rng(3)
    ids = np.concatenate([[CLS], np.full(9, 7), [SEP], np.full(9, 8), [SEP]])
    for _ in range(300):
        _, _, labels = drawn.mask(ids, rng)
        assert not np.isin(labels, [CLS, SEP]).any()
    drawn.spans_stop_at_special = False
    crossing = sum(np.isin(drawn.mask(ids, rng)[2], [CLS, SEP]).any() for _ in range(300))
    assert crossing > 10


def test_whole_words_are_taken_together(tmp_path: Path) -> None:
    from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer

    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##s", "go"]) + "\n")
    tokenizer = build_tokenizer(TokenizerConfig(vocab_path=str(path)))
    drawn = Masker(DataConfig(whole_word_masking=True), tokenizer)
    ids = np.array([2, *[5, 6] * 6, 3, *[8, 5, 7] * 5, 3])
    rng = np.random.default_rng(0)
    for _ in range(200):
        _, positions, _ = drawn.mask(ids, rng)
        taken = set(positions.tolist())
        for position in taken:
            if position + 1 < len(ids) and ids[position + 1] in (6, 7):
                assert position + 1 in taken
            if ids[position] in (6, 7):
                assert position - 1 in taken


def test_random_replacements_are_ordinary_tokens(vocabulary: Path) -> None:
    allowed = masker(vocabulary).ordinary_ids
    assert allowed.tolist() == list(range(5, 5 + len(WORDS)))
    assert SENTINELS > 0


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, 200), seed=st.integers(0, 10**6))
def test_infilling_removes_three_tenths_in_separate_spans(length: int, seed: int) -> None:
    ids = np.arange(10, 10 + length)
    result = infill(ids, 4, np.random.default_rng(seed))
    kept = result[result != 4]
    assert np.array_equal(kept, np.sort(kept))
    assert not ((result[1:] == 4) & (result[:-1] == 4)).any()
    assert length - len(kept) <= round(0.3 * length)
    if length > 20:
        assert length - len(kept) == round(0.3 * length)
