"""Pre-training in several processes: how they are started, stopped, and what happens when one fails."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tencentpretrain.reliability import runs
from tencentpretrain.reliability.processes import at_step, free_port, start_ranks

STEPS = 20


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("lm")
    return [*runs.prepare("lm", folder, STEPS, 10), "--num_workers", "0", "--report_steps", "1"]


@pytest.fixture(scope="module")
def alone(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that was left alone."""
    output = tmp_path_factory.mktemp("alone") / "alone"
    ranks = start_ranks(flags, output)
    assert ranks.wait() == {0: 0, 1: 0}, ranks.text(0) + ranks.text(1)
    return output


def test_only_the_leader_writes_reports(alone: Path) -> None:
    folder = Path(f"{alone}.run")
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert " in 2 processes, " in (folder / "log.txt").read_text()
    assert (folder / "log-rank-0001.txt").exists()
    assert not list(folder.glob("stacks-*"))
    assert " INFO] " not in Path(f"{alone}-rank-1.txt").read_text(), "other ranks are silent unless something is wrong"


@pytest.mark.parametrize(("struck", "number", "code"), [((1,), signal.SIGTERM, 143), ((0, 1), signal.SIGINT, 130)])
def test_a_signal_to_any_rank_stops_all(
    flags: list[str], alone: Path, tmp_path: Path, struck: Sequence[int], number: int, code: int
) -> None:
    output = tmp_path / "stopped"
    faults = {rank: at_step(6, lambda: os.kill(os.getpid(), number)) for rank in struck}
    ranks = start_ranks(flags, output, faults=faults)
    assert ranks.wait() == {0: code, 1: code}, ranks.text(0) + ranks.text(1)
    assert [path.name for path in runs.checkpoints_of(output).glob("step-*")] == ["step-00000007"]
    assert start_ranks(flags, output).wait() == {0: 0, 1: 0}
    assert runs.differences(alone, output, STEPS) == []


def test_two_nodes_on_one_machine(flags: list[str], alone: Path, tmp_path: Path) -> None:
    """Two torchrun agents with one process each, as on two machines."""
    from torch.distributed import run as torchrun

    script = Path(__file__).resolve().parents[2] / "pretrain.py"
    output, port = tmp_path / "nodes", free_port()

    def agent(arguments: Sequence[str]) -> int:
        torchrun.main(arguments)
        return 0

    agents = [
        runs.start(
            agent,
            ["--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1", "--master_addr", "localhost",
             "--master_port", str(port), str(script), *flags, "--output_model_path", str(output)],
            tmp_path / f"node-{node}.txt",
        )
        for node in (0, 1)
    ]  # fmt: skip
    codes = [runs.wait(pid, 240) for pid in agents]
    assert codes == [0, 0], (tmp_path / "node-0.txt").read_text() + (tmp_path / "node-1.txt").read_text()
    assert runs.differences(alone, output, STEPS) == []


def test_listed_ranks_are_started_without_a_launcher(flags: list[str], alone: Path, tmp_path: Path) -> None:
    """The first start loses a rank, the second finishes."""
    output = tmp_path / "listed"
    listed = ["--world_size", "2", "--gpu_ranks", "0", "1", "--master_ip", f"tcp://localhost:{free_port()}"]
    arguments = [*flags, *listed, "--output_model_path", str(output), "--backend", "gloo"]
    starter = runs.start(runs.command("pretrain"), arguments, runs.log_of(output))
    runs.wait_for_step(output, 5, starter, 120)
    children = [int(pid) for pid in Path(f"/proc/{starter}/task/{starter}/children").read_text().split()]
    victim = next(
        pid for pid in children if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes().replace(b"\0L", b"\0 ")
    )
    os.kill(victim, signal.SIGKILL)
    assert runs.wait(starter, 120) == 7
    end = "\n".join(runs.log_of(output).read_text().splitlines()[-20:])
    assert f"(process {victim}) ended by SIGKILL (out of memory?)" in end
    assert "(last step " in end
    assert runs.wait(runs.start(runs.command("pretrain"), arguments, runs.log_of(output)), 240) == 0
    assert runs.differences(alone, output, STEPS) == []


def test_fewer_samples_than_ranks(tmp_path: Path) -> None:
    flags = [*runs.prepare("cls", tmp_path, STEPS, 10, lines=1), "--num_workers", "0"]
    ranks = start_ranks(flags, tmp_path / "few")
    assert ranks.wait() == {0: 3, 1: 3}
    assert "has 1 samples for 2 processes" in ranks.text(0)


def test_an_error_of_the_leader_alone_reaches_all(flags: list[str], alone: Path) -> None:
    """Another run holds the folder: only the leader meets its lock."""
    import fcntl

    with Path(f"{alone}.run/lock").open("r+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        ranks = start_ranks(flags, alone)
        assert ranks.wait() == {0: 5, 1: 7}
    assert "in use by another run" in ranks.text(0)
    assert "in use by another run" in ranks.text(1)


def _poison() -> None:
    from dataclasses import replace

    from tencentpretrain.model import Model

    forward = Model.forward

    def bad(model: Model, *arguments: object, **keywords: object) -> object:
        output = forward(model, *arguments, **keywords)  # type: ignore[arg-type]
        losses = {name: replace(loss, total=loss.total * float("nan")) for name, loss in output.losses.items()}
        return replace(output, losses=losses)

    Model.forward = bad  # type: ignore[method-assign, assignment]


def test_all_ranks_refuse_a_loss_that_is_not_finite_on_one(flags: list[str], tmp_path: Path) -> None:
    ranks = start_ranks(flags, tmp_path / "nan", faults={1: at_step(6, _poison)})
    assert ranks.wait() == {0: 6, 1: 6}
    for rank in (0, 1):
        assert "step 7: the loss lm is not finite for samples 48 to 55" in ranks.text(rank)
        assert "(on data rank 1)" in ranks.text(rank)
    assert "the first bad module" in ranks.text(1)
    assert "the first bad module" not in ranks.text(0)


def test_validation_does_not_depend_on_the_number_of_ranks(flags: list[str]) -> None:
    from tencentpretrain.config.train import PrecisionConfig
    from tencentpretrain.engines.local import LocalEngine
    from tencentpretrain.reliability.determinism import model_and_batches
    from tencentpretrain.train.validation import validate

    class Share(LocalEngine):
        """One of several ranks, whose sums are noted and completed by those of the others."""

        def __init__(self, rank: int, size: int, others: Sequence[list[Mapping[str, float]]]) -> None:
            super().__init__(PrecisionConfig(device="cpu", threads=1))
            self.data_rank, self.data_size, self.others = rank, size, others
            self.noted: list[Mapping[str, float]] = []

        def sum_over_ranks(self, counts: Mapping[str, float]) -> dict[str, float]:
            number = len(self.noted)
            self.noted.append(dict(counts))
            return {key: value + sum(other[number][key] for other in self.others) for key, value in counts.items()}

    model, batches = model_and_batches(flags, 3, 5)
    single = validate(model, batches, Share(0, 1, []))
    for size in (2, 3, 8):
        others = [Share(rank, size, []) for rank in range(1, size)]
        for other in others:
            validate(model, batches, other)
        assert validate(model, batches, Share(0, size, [other.noted for other in others])) == single
