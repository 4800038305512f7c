"""What launchers say in the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tencentpretrain.config.launcher import Place, first_host, parse_address, read_place
from tencentpretrain.config.train import LaunchConfig
from tencentpretrain.engines.joining import local_device, local_threads
from tencentpretrain.errors import ConfigError

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_STEP_NODELIST": "gpu[003-005]", "SLURM_JOB_ID": "40017",
}  # fmt: skip


def test_nothing_is_said() -> None:
    assert read_place({}) is None
    assert read_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None, "the batch script itself is no process"
    assert read_place({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_torchrun() -> None:
    assert read_place(TORCHRUN) == Place(
        rank=5, world_size=8, local_rank=1, local_world_size=4, address="node1", port=29500, launcher="torchrun",
        served=True,
    )  # fmt: skip


def test_deepspeed_launcher() -> None:
    place = read_place(
        {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"}
    )
    assert place is not None
    assert (place.local_world_size, place.served) == (2, False)


def test_slurm() -> None:
    place = read_place(SLURM)
    assert place == Place(
        rank=5, world_size=6, local_rank=1, local_world_size=2, address="gpu003", port=15017 + 20000 * 0,
        launcher="Slurm",
    )  # fmt: skip
    assert read_place({**SLURM, **TORCHRUN}) == read_place(TORCHRUN), "torchrun below srun counts"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a", "a"), ("a,b", "a"), ("gpu[07-09,12],x", "gpu07"), ("n[1]-ib", "n1-ib"), ("r1n[001-004]", "r1n001")],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "8"}, "RANK: is 8, but with WORLD_SIZE 8 must be 0 to WORLD_SIZE - 1"),
        ({"RANK": "x"}, "RANK: is 'x' in the environment, but must be a number"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK: is 4, but with LOCAL_WORLD_SIZE 4 must be less"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE: is 9, more than WORLD_SIZE 8"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: is 70000"),
    ],
)
def test_wrong_variables(changed: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_place({**TORCHRUN, **changed})


def test_missing_variable() -> None:
    with pytest.raises(ConfigError, match="LOCAL_RANK: is not set"):
        read_place({"RANK": "0", "WORLD_SIZE": "2"})


def test_addresses() -> None:
    assert parse_address("tcp://10.0.0.1:12345") == ("10.0.0.1", 12345)
    assert parse_address("tcp://[::1]:80") == ("::1", 80)
    assert parse_address("host:1") == ("host", 1)
    for wrong in ("tcp://host", "http://host:1", "tcp://host:x", "tcp://host:1/path", ""):
        with pytest.raises(ConfigError, match="must be tcp://"):
            parse_address(wrong)


def test_world_size_against_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert not list(LaunchConfig(world_size=8).problems())
    assert not list(LaunchConfig().problems())
    assert list(LaunchConfig(world_size=4).problems()) == [
        "world_size: is 4, but torchrun started 8 processes; leave it out"
    ]


def test_device_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    place = read_place(TORCHRUN)
    assert place is not None
    assert local_device("cpu", place) == "cpu"
    with pytest.raises(ConfigError, match="cuda:1 is one GPU, but 4 processes run here"):
        local_device("cuda:1", place)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert local_threads(place) == 4, "torchrun's 1 is nobody's wish"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local_threads(place) is None


def test_slurm_batch_file(tmp_path: Path) -> None:
    """With stand-ins for Slurm's programs: SIGTERM reaches the processes, and the job is queued again."""
    import subprocess
    import time

    from tencentpretrain.entry.slurm import main

    batch = tmp_path / "run.sbatch"
    flags = ["--vocab_path", "v.txt", "--config_path", "models/bert/mini_config.json", "--output_model_path", "a b"]
    assert main(["--nodes", "2", "--processes_per_node", "4", "--output", str(batch), "--", "pretrain.py", *flags]) == 0
    text = batch.read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n" in text
    assert "--output_model_path 'a b' &" in text
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_ins = {
        "srun": f"trap 'echo $* > {tmp_path}/told; exit 143' TERM\ntouch {tmp_path}/began\nwhile :; do sleep 0.1; done",
        "scontrol": f'[ "$1" = requeue ] && echo "$2" > {tmp_path}/requeued || echo node1',
    }
    for name, content in stand_ins.items():
        (programs / name).write_text(f"#!/bin/bash\n{content}\n")
        (programs / name).chmod(0o755)
    variables = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]"}
    job = subprocess.Popen(["bash", str(batch)], env=variables)
    deadline = time.monotonic() + 20
    while not (tmp_path / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.terminate()
    assert job.wait(20) == 143
    assert (tmp_path / "requeued").read_text() == "77\n"
    assert "pretrain.py --vocab_path v.txt" in (tmp_path / "told").read_text()


def test_slurm_refuses_what_the_job_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    from tencentpretrain.entry.slurm import main

    assert main(["--nodes", "0", "--", "pretrain.py", "--world_size", "2"]) == 2
    message = capsys.readouterr().err
    assert "nodes: is 0, but must be at least 1" in message
    assert "--world_size: Slurm says which process is which" in message
    assert main(["--", "pretrain.py", "--vocab_path", "v.txt", "--leraning_rate", "1"]) == 2
    assert "--leraning_rate: unknown flag" in capsys.readouterr().err
    assert main(["--", "preprocess.py"]) == 2
