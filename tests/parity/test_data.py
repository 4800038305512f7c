"""Data processors against recorded instances, batches and statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tencentpretrain.parity.data import _WITHOUT_TEXT, check

NAMES = [
    "bilm",
    "cls",
    "cls_mlm_dynamic",
    "cls_mlm_pair_dynamic",
    "cls_pair",
    "gsg_lead",
    "llm_pretrain",
    "llm_pretrain_full_sentences",
    "llm_sft",
    "lm",
    "lm_bpe",
    "lm_char",
    "lm_full_sentences",
    "lm_json",
    "lm_json_full_sentences",
    "lm_long",
    "mlm_dynamic",
    "mlm_dynamic_full_sentences",
    "mt",
    "prefixlm",
]


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_processors_are_equal(shared: Path, name: str) -> None:
    (result,) = check(shared / "parity" / "data" / f"{name}.json", shared / "data" / "vocab")
    assert result.passed, result.detail


def test_every_record_of_text_is_checked(shared: Path) -> None:
    records = {path.stem: json.loads(path.read_text()) for path in (shared / "parity" / "data").glob("*.json")}
    text = {name for name, record in records.items() if record.get("data_processor", "vit") not in _WITHOUT_TEXT}
    assert text == set(NAMES)
    (result,) = check(shared / "parity" / "data" / "vit.json", shared / "data" / "vocab")
    assert not result.passed


@pytest.mark.slow
def test_random_processors_agree_in_their_statistics(shared: Path) -> None:
    results = check(shared / "parity" / "data" / "stochastic_statistics.json", shared / "data" / "vocab")
    assert len(results) > 20
    assert not [f"{result.name}: {result.detail}" for result in results if not result.passed]
