"""Every row of the reliability table at the scale of ordinary CI."""

from __future__ import annotations

from pathlib import Path

import pytest

from tencentpretrain.reliability import table


@pytest.mark.parametrize("name", table.names())
def test_row(name: str, tmp_path: Path) -> None:
    row = table.check(name, "ci", tmp_path)
    assert row.name == name
    assert row.passed, f"promised: {row.promised}\nreached: {row.reached}"
