"""Recorded training runs: exact trajectories, and curves within the spread of seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tencentpretrain.parity.curves import check


@pytest.mark.parametrize("name", ["trajectory_bert", "trajectory_gpt2", "trajectory_gpt2_adafactor"])
def test_trajectories(shared: Path, name: str) -> None:
    results = check(shared / "parity" / "curves" / f"{name}.json")
    assert len(results) == 2
    assert not [result for result in results if not result.passed]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert_tiny", "gpt2_tiny"])
def test_curves(shared: Path, name: str) -> None:
    results = check(shared / "parity" / "curves" / f"{name}.json")
    assert len(results) == 2
    assert not [result for result in results if not result.passed]
