"""Contrastive learning over several processes equals one process with the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.model import Model, build_model

PROCESSES = 2


def build() -> Model:
    stream = ModelConfig(emb_size=8, hidden_size=8, num_layers=1, encoder="gru", embedding=("word",), pooling="mean")
    config = ModelConfig(
        embedding=("dual",),
        encoder="dual",
        target=("clr",),
        projection=True,
        feature_size=5,
        streams=(stream, stream),
    )
    return build_model(config, 30, std=0.5, seed=0).eval()


def make_batch(rows: slice) -> Batch:
    tokens = torch.randint(1, 30, (2, 4, 6), generator=torch.Generator().manual_seed(1))
    first, second = tokens[0, rows], tokens[1, rows]
    return Batch(token_ids=(first, second), segment_ids=(torch.ones_like(first), torch.ones_like(second)))


def gradients(model: Model, rows: slice) -> dict[str, torch.Tensor]:
    """The summed loss and its gradients, as an engine gathers them."""
    loss = model(make_batch(rows)).losses["clr"]
    loss.total.backward()
    result = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {
        "total": loss.total.detach(),
        "count": loss.count.float(),
        "correct": loss.correct.float(),  # type: ignore[union-attr]
        **result,
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    share = gradients(build(), slice(rank * 2, rank * 2 + 2))
    for tensor in share.values():
        torch.distributed.all_reduce(tensor)
    if rank == 0:
        torch.save(share, Path(folder) / "sums.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_contrastive_loss_over_two_processes(tmp_path: Path) -> None:
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(PROCESSES)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    shares = torch.load(tmp_path / "sums.pt", weights_only=True)
    whole = gradients(build(), slice(0, 4))
    assert shares.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(shares[name], tensor, atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
