"""Every recorded text model: outputs, layers, logits, losses, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest

from tencentpretrain.parity.models import check
from conftest import shared_folder

VISION_AND_SPEECH = {"beit", "clip", "s2t", "vilt", "vit"}


def families() -> list[str]:
    folder = shared_folder()
    if folder is None:
        return ["bert"]
    return sorted(path.stem for path in (folder / "parity/models").glob("*.json") if path.stem != "units")


@pytest.mark.parametrize("family", families())
def test_family(family: str, shared: Path) -> None:
    if family in VISION_AND_SPEECH:
        pytest.skip("needs parts of the vision and speech line")
    results = check(shared / "parity/models" / f"{family}.json")
    failed = [f"{result.name}: {result.deviation:.3g} {result.detail}" for result in results if not result.passed]
    assert not failed
    least = 4 if family == "cls_max_two_segments" else 7
    assert len(results) >= least
