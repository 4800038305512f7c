"""Files of tensors: every form reads alike, every wrong file is named."""

from __future__ import annotations

import functools
import importlib
import json
import os
import pickle
import random
import runpy
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tencentpretrain.checkpoint.files import read_tensors, write_tensors
from tencentpretrain.errors import CheckpointMismatch, ResourceError


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "embedding.word.embedding.weight": torch.randn(7, 4, generator=generator),
        "encoder.layer_norm.gamma": torch.randn(4, generator=generator).to(torch.bfloat16),
        "target.clr.logit_scale": torch.tensor(2.5),
    }


def assert_equal(path: Path, expected: dict[str, Tensor]) -> None:
    found = read_tensors(path)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found.shape(name) == tuple(tensor.shape)
        assert found.dtype(name) == found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_round_trip(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"model.{form}"
    write_tensors(path, some_tensors(), form)
    assert_equal(path, some_tensors())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_bytes_do_not_depend_on_the_name(tmp_path: Path, form: str) -> None:
    write_tensors(tmp_path / "a", some_tensors(), form)
    write_tensors(tmp_path / "other", some_tensors(), form)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_tied_tensors_come_back_under_both_names_and_stand_once_in_the_file(tmp_path: Path, form: str) -> None:
    word = torch.randn(300, 40)
    tensors = {"embedding.word.embedding.weight": word, "target.lm.output_layer.weight": word}
    write_tensors(tmp_path / "m", tensors, form)
    assert_equal(tmp_path / "m", tensors)
    assert (tmp_path / "m").stat().st_size < 1.2 * word.nbytes


def test_views_of_a_large_storage_are_cut_out(tmp_path: Path) -> None:
    large = torch.randn(1000, 100)
    write_tensors(tmp_path / "m.bin", {"encoder.x": large[:2]}, "bin")
    assert (tmp_path / "m.bin").stat().st_size < 10_000
    assert_equal(tmp_path / "m.bin", {"encoder.x": large[:2]})


@pytest.mark.parametrize("wrap", ["module", "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, wrap: str, zipped: bool) -> None:
    inner = OrderedDict((f"module.{name}", torch.nn.Parameter(tensor)) for name, tensor in some_tensors().items())
    torch.save({wrap: inner, "step": 7}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    assert_equal(tmp_path / "m.pt", {name: tensor for name, tensor in some_tensors().items()})


@pytest.mark.parametrize("indexed", [True, False])
def test_sharded_directory_equals_the_single_file(tmp_path: Path, indexed: bool) -> None:
    tensors = some_tensors()
    weight_map = {name: f"tencentpretrain_model-{index % 2}.bin" for index, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == shard}, tmp_path / shard)
    if indexed:
        index = tmp_path / "tencentpretrain_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map, "metadata": {"total_size": 66}}))
        assert_equal(index, tensors)
    assert_equal(tmp_path, tensors)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"shard model-2\.safetensors is missing"):
        read_tensors(tmp_path)


def test_shard_outside_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../evil.safetensors"}}))
    with pytest.raises(CheckpointMismatch, match="outside the directory"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        (b"", "empty file"),
        (b'{"hidden_size": 768}', "JSON file"),
        (b'{"architectures": ["BertModel"], "model_type": "bert"}', "Hugging Face config"),
        (b"\x1f\x8b\x08\x00abc", "gzip"),
        (b"hello world", "text file"),
    ],
)
def test_wrong_content_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointMismatch, match=said) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)


def test_zip_and_missing_paths_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointMismatch, match="zip archive"):
        read_tensors(tmp_path / "m.bin")
    with pytest.raises(CheckpointMismatch, match="no such file"):
        read_tensors(tmp_path / "nothing.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointMismatch, match="is empty"):
        read_tensors(tmp_path / "empty")


@pytest.mark.parametrize("form", ["bin", "safetensors", "legacy"])
def test_every_truncation_is_refused(tmp_path: Path, form: str) -> None:
    path = tmp_path / "whole"
    if form == "legacy":
        torch.save(some_tensors(), path, _use_new_zipfile_serialization=False)
    else:
        write_tensors(path, some_tensors(), form)
    content = path.read_bytes()
    lengths = [0, 1, 8, 9, 12, len(content) - 1, *random.Random(0).sample(range(len(content)), 20)]
    for length in lengths:
        cut = tmp_path / "cut"
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointMismatch, match="cut"):
            read_tensors(cut)


class _Payload:
    """Unpickling it would run `code`, reached through one of the doors that pickles have."""

    def __init__(self, door: str, marker: str) -> None:
        code = f"import os; os.mkdir({marker!r})"
        self.doors: dict[str, tuple[object, ...]] = {
            "function": (os.mkdir, (marker,)),
            "system": (os.system, (f"mkdir {marker}",)),
            "eval": (eval, (f"__import__('os').mkdir({marker!r})",)),
            "exec": (exec, (code,)),
            "popen": (subprocess.Popen, (["mkdir", marker],)),
            "import": (importlib.import_module, ("antigravity",)),
            "runpy": (runpy.run_path, (marker,)),
            "state": (_Stateful, (), {"marker": marker}),
            "items": (dict, (), None, None, iter([(marker, _Stateful())])),
            "list": (list, (), None, iter([_Stateful()])),
            "partial": (functools.partial, (os.mkdir, marker)),
            "numpy": (np.frombuffer, (b"12345678",)),
            "torch.load": (torch.load, (marker,)),
            "compile": (compile, (code, "x", "exec")),
        }
        self.door = door

    def __reduce__(self) -> tuple[object, ...]:
        return self.doors[self.door]


class _Stateful:
    def __setstate__(self, state: dict[str, str]) -> None:
        os.mkdir(state["marker"])


DOORS = ("function", "system", "eval", "exec", "popen", "import", "runpy", "state", "items", "list", "partial",
         "numpy", "torch.load", "compile")  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "nested", "shard"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, form: str, door: str) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "evil.bin"
    payload = _Payload(door, str(marker))
    if form == "pickle":
        path.write_bytes(pickle.dumps({"a": payload}))
    elif form == "nested":
        torch.save({"module": {"a": torch.ones(1), "b": [payload]}}, path)
    else:
        torch.save({"a": payload}, path, _use_new_zipfile_serialization=form != "legacy")
    if form == "shard":
        index = {"weight_map": {"a": "evil.bin"}}
        (tmp_path / "model.bin.index.json").write_text(json.dumps(index))
        path = tmp_path
    with pytest.raises(CheckpointMismatch, match=r"evil\.bin: "):
        read_tensors(path)
    assert not marker.exists()


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "m.pt"))
    with pytest.raises(CheckpointMismatch, match="TorchScript"):
        read_tensors(tmp_path / "m.pt")


def test_lying_safetensors_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3)}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    lies = [
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [-1, 3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 2**63]},
        {"dtype": "F99", "shape": [2, 3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]},
        {"dtype": "F32", "shape": "many", "data_offsets": [0, 24]},
    ]
    for lie in lies:
        changed = json.dumps({**header, "a": lie}).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
        with pytest.raises(CheckpointMismatch, match=r"m\.safetensors"):
            read_tensors(path)
    for size in (0, 2**40, 2**63):
        path.write_bytes(size.to_bytes(8, "little") + content[8:])
        with pytest.raises(CheckpointMismatch, match=r"m\.safetensors"):
            read_tensors(path)


def test_random_header_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    write_tensors(tmp_path / "whole", some_tensors(), "safetensors")
    content = (tmp_path / "whole").read_bytes()
    length = int.from_bytes(content[:8], "little")
    draw = random.Random(3)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(8 + length)] = draw.randrange(256)
        (tmp_path / "bad").write_bytes(damaged)
        try:
            opened = read_tensors(tmp_path / "bad")
            assert sum(opened[name].nbytes for name in opened) <= len(content)
        except CheckpointMismatch:
            continue


def test_unwritable_target_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_tensors(tmp_path / "file" / "model.bin", some_tensors())
    assert (tmp_path / "file").read_text() == "x"
