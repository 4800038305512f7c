"""Checkpoints in one file per rank or layer, read as whole tensors and joined into one file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tencentpretrain.checkpoint.files import read_tensors
from tencentpretrain.checkpoint.loading import load_checkpoint
from tencentpretrain.checkpoint.training import CheckpointFolder, TrainingState
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.entry.consolidate import main
from tencentpretrain.errors import CheckpointMismatch
from tencentpretrain.model import Model, build_model
from tencentpretrain.parallel.tensor import make_plan

CONFIG = ModelConfig(
    emb_size=16, hidden_size=16, feed_forward_size=32, num_heads=4, num_layers=3, hidden_act="silu",
    feed_forward="gated", embedding=("word",), target=("lm",), mask="causal", layernorm="rms",
    layernorm_positioning="pre", rotary_position_embedding=True, transformer_bias=False, embedding_layernorm=False,
    max_seq_length=16,
)  # fmt: skip
BERT = ModelConfig(
    emb_size=16, hidden_size=16, feed_forward_size=32, num_heads=4, num_layers=2, hidden_act="gelu",
    embedding=("word", "pos", "seg"), target=("mlm", "sp"), max_seq_length=16,
)  # fmt: skip
RANKS = 2


def whole(config: ModelConfig = CONFIG) -> tuple[Model, dict[str, Tensor]]:
    model = build_model(config, 20, seed=1)
    return model, dict(model.state_dict())


def slices(model: Model, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    plans = [make_plan(model, rank, RANKS) for rank in range(RANKS)]
    return [
        {
            name: (plan.slices[name].of(tensor) if name in plan.slices else tensor).clone()
            for name, tensor in tensors.items()
        }
        for plan in plans
    ]


def write_ranks(folder: Path, config: ModelConfig = CONFIG, wrapped: bool = False) -> dict[str, Tensor]:
    model, tensors = whole(config)
    folder.mkdir()
    for rank, part in enumerate(slices(model, tensors)):
        torch.save({"module": part} if wrapped else part, folder / f"mp_rank_{rank:02d}_model_states.pt")
    return tensors


def write_layers(folder: Path) -> dict[str, Tensor]:
    model, tensors = whole()
    folder.mkdir()
    last = CONFIG.num_layers + 1  # type: ignore[operator]
    for rank, part in enumerate(slices(model, tensors)):
        files: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part.items():
            block = re.match(r"encoder\.transformer\.(\d+)\.", name)
            if block:
                number, bare = int(block[1]) + 1, "layer." + name[block.end() :]
            elif name.startswith("encoder.layer_norm."):
                number, bare = last - 1, name.removeprefix("encoder.")
            elif name.startswith("embedding."):
                number, bare = 0, "embeddings." + name.removeprefix("embedding.")
            else:
                number, bare = last, "target_layer." + name.removeprefix("target.")
            files.setdefault(number, {})[bare] = tensor
        for number, content in files.items():
            torch.save(content, folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
    return tensors


def assert_equal(found: object, expected: dict[str, Tensor]) -> None:
    assert isinstance(found, dict)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("config", [CONFIG, BERT], ids=["llama", "bert"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "module"])
def test_ranks_are_joined(tmp_path: Path, config: ModelConfig, wrapped: bool) -> None:
    expected = write_ranks(tmp_path / "ranks", config, wrapped)
    assert_equal(dict(read_tensors(tmp_path / "ranks")), expected)
    assert main([str(tmp_path / "ranks"), str(tmp_path / "one.bin")]) == 0
    assert_equal(torch.load(tmp_path / "one.bin", weights_only=True), expected)


def test_layers_are_joined(tmp_path: Path) -> None:
    expected = write_layers(tmp_path / "layers")
    assert main([str(tmp_path / "layers"), str(tmp_path / "one.safetensors")]) == 0
    assert_equal(dict(read_tensors(tmp_path / "one.safetensors")), expected)
    model = build_model(CONFIG, 20, seed=2)
    load_checkpoint(model, tmp_path / "layers")
    assert_equal(dict(model.state_dict()), expected)


def test_a_run_s_checkpoint_becomes_one_file(tmp_path: Path) -> None:
    _, tensors = whole()
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.folder.mkdir()
    folder.save(3, TrainingState(model=tensors, optimizer={}, values={"step": 3}))
    for number, source in enumerate((folder.folder, folder.path(3))):
        output = tmp_path / f"{number}.bin"
        assert main([str(source), str(output)]) == 0
        assert_equal(torch.load(output, weights_only=True), tensors)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tensors = whole()
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.folder.mkdir()
    path = folder.save(3, TrainingState(model=tensors, optimizer={}, values={"step": 3}))
    file = next(path.glob("model*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main([str(path), str(tmp_path / "one.bin")]) == 4
    assert file.name in capsys.readouterr().err
    assert not (tmp_path / "one.bin").exists()


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    write_ranks(tmp_path / "ranks")
    (tmp_path / "ranks" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointMismatch, match="mp_rank_00_model_states.pt is missing".replace(".", r"\.")):
        read_tensors(tmp_path / "ranks")


@pytest.mark.parametrize(
    "lost", ["layer_02-model_01-model_states.pt", "layer_01-model_0?-model_states.pt", "layer_04-*"]
)
def test_a_missing_layer_is_named(tmp_path: Path, lost: str) -> None:
    write_layers(tmp_path / "layers")
    for file in (tmp_path / "layers").glob(lost):
        file.unlink()
    with pytest.raises(CheckpointMismatch, match=lost[:8]):
        read_tensors(tmp_path / "layers")


def test_ranks_of_different_runs_are_refused(tmp_path: Path) -> None:
    write_ranks(tmp_path / "ranks")
    file = tmp_path / "ranks" / "mp_rank_01_model_states.pt"
    content = torch.load(file, weights_only=True)
    content["encoder.layer_norm.weight"] = content["encoder.layer_norm.weight"] + 1
    torch.save(content, file)
    with pytest.raises(CheckpointMismatch, match=r"encoder.layer_norm.weight differs between ranks 0 and 1"):
        dict(read_tensors(tmp_path / "ranks"))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    write_ranks(tmp_path / "ranks")
    torch.save({"module": {"a": torch.zeros(1)}, "args": Path("x")}, tmp_path / "ranks" / "mp_rank_01_model_states.pt")
    assert main([str(tmp_path / "ranks"), str(tmp_path / "one.bin")]) == 4


@pytest.mark.parametrize("words", [["a"], ["a", "b.txt"], ["a", "b.bin", "c"]])
def test_a_bad_command_line_is_refused(words: list[str]) -> None:
    assert main(words) == 2


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_ranks(tmp_path / "ranks")
    (tmp_path / "one.bin").write_bytes(b"kept")
    assert main([str(tmp_path / "ranks"), str(tmp_path / "one.bin")]) == 2
    assert (tmp_path / "one.bin").read_bytes() == b"kept"
