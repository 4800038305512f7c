"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def shared_folder() -> Path | None:
    """The folder with recorded numbers and real data, if this machine has it."""
    folder = Path(os.environ.get("TENCENTPRETRAIN_SHARED", ROOT.parent / "shared"))
    return folder if (folder / "parity").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared folder; the test is skipped, with the reason, where it is absent."""
    folder = shared_folder()
    if folder is None:
        if os.environ.get("CI"):
            pytest.fail("../shared (recorded numbers and data) is absent, but CI must run these tests")
        pytest.skip("needs ../shared (recorded numbers and data), which this machine does not have")
    return folder
