"""Shards: cut by the published rule, read like one file, written again to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tencentpretrain.checkpoint.files import read_tensors, write_tensors
from tencentpretrain.checkpoint.shards import INDEX_NAME, write_shards
from tencentpretrain.errors import ResourceError


def test_shards_equal_the_single_file_and_are_regenerated_identically(tmp_path: Path) -> None:
    tensors = {f"encoder.{index}": torch.randn(10, 10) for index in range(7)}
    write_tensors(tmp_path / "whole.bin", tensors)
    write_shards(tmp_path / "shards", tensors, block_size=250 / 5e8)
    index = json.loads((tmp_path / "shards" / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_size": 2 * 700}
    assert list(index["weight_map"].values()) == [f"tencentpretrain_model-{n}.bin" for n in (0, 0, 0, 1, 1, 1, 2)]
    whole, shards = read_tensors(tmp_path / "whole.bin"), read_tensors(tmp_path / "shards")
    assert list(shards) == list(whole)
    assert all(torch.equal(shards[name], whole[name]) for name in whole)
    write_shards(tmp_path / "again", shards, block_size=250 / 5e8)
    for file in (tmp_path / "shards").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_an_existing_directory_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="exists already"):
        write_shards(tmp_path, {"a": torch.ones(1)})
