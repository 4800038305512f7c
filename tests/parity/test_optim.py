"""Recorded optimizer steps and learning-rate curves."""

from __future__ import annotations

from pathlib import Path

from tencentpretrain.parity.optim import check


def test_recorded_steps_and_curves(shared: Path) -> None:
    results = check(shared / "parity" / "optim")
    assert len(results) == 45
    assert not [result for result in results if not result.passed]
