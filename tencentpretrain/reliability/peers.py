"""P1 to P6: processes of a run that die, hang, disagree, are slow, are missing, or are started again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs
from tencentpretrain.reliability.processes import Fault, Ranks, at_step, children, free_port, start_ranks
from tencentpretrain.reliability.row import Row, Scale

_STEPS = 30
_MOST_SECONDS = 60.0


def _flags(folder: Path, *more: str, workers: int = 0) -> list[str]:
    prepared = runs.prepare("lm", folder / "data", _STEPS, 10)
    return [*prepared, "--num_workers", str(workers), "--join_timeout", "60", *more]


def _counted(name: str, promised: str, problems: Sequence[Sequence[str]], more: str = "") -> Row:
    good = sum(not found for found in problems)
    first = next((f"; {'; '.join(found)}" for found in problems if found), "")
    return Row(
        name=name, promised=promised, reached=f"{good} of {len(problems)}{more}{first}", passed=good == len(problems)
    )


@dataclass(frozen=True, kw_only=True)
class Death:
    """A way for a process to die in the midst of a step.

    Fields:
        happens: what it does to itself.
        code: how it ends.
        word: what the others must say of it.
    """

    happens: Callable[[], None]
    code: int
    word: str


def _raise() -> None:
    raise ValueError("a part is broken")


def _crash() -> None:
    import ctypes

    ctypes.string_at(0)


def _use_up_memory() -> None:
    """Dies as by the kernel's killer: a child outlives it for a moment and kills it."""
    pid = os.getpid()
    if os.fork() == 0:
        os.kill(pid, signal.SIGKILL)
        os._exit(0)
    time.sleep(60)


DEATHS: Mapping[str, Death] = {
    "SIGKILL": Death(happens=lambda: os.kill(os.getpid(), signal.SIGKILL), code=-signal.SIGKILL, word="SIGKILL"),
    "exception": Death(happens=_raise, code=1, word="a part is broken"),
    "exit(0)": Death(happens=lambda: sys.exit(0), code=0, word="sys.exit(0)"),
    "out of memory": Death(happens=_use_up_memory, code=-signal.SIGKILL, word="out of memory"),
    "segfault": Death(happens=_crash, code=-signal.SIGSEGV, word="SIGSEGV"),
}


@ROWS.register("P1")
def check_deaths(scale: Scale, folder: Path) -> Row:
    """One of two ranks dies in some way at a random step."""
    flags = _flags(folder)
    draw = random.Random(1)
    problems, slowest = [], 0.0
    for number in range(100 if scale == "full" else len(DEATHS)):
        kind, death = list(DEATHS.items())[number % len(DEATHS)]
        rank, step = draw.randrange(2), draw.randrange(1, 12 if scale == "full" else 9)
        output = folder / f"run-{number}"
        ranks = start_ranks(flags, output, faults={rank: at_step(step, death.happens)})
        found, seconds = _judge(ranks, rank, step, death)
        problems.append([f"{kind} of rank {rank} at step {step}: {problem}" for problem in found])
        slowest = max(slowest, seconds)
        shutil.rmtree(f"{output}.run", ignore_errors=True)
    promised = "100 of 100 deaths end the run in 60 s with exit 7, told by rank, host, signal and step; no process left"
    return _counted("P1", promised, problems, f" deaths of 5 kinds, slowest end after {slowest:.1f} s")


_LOST_STORE = "rank 0, which holds the run together, does not answer"


def _judge(ranks: Ranks, dead: int, step: int, death: Death) -> tuple[list[str], float]:
    codes = ranks.wait(_MOST_SECONDS + 60)
    other = 1 - dead
    seconds = max(0.0, ranks.seconds[other] - ranks.seconds[dead])
    end = ranks.end_of(other)
    found = []
    if codes != {dead: death.code, other: 7}:
        found.append(f"exit codes {codes}")
    if seconds > _MOST_SECONDS:
        found.append(f"the other ended after {seconds:.0f} s")
    wanted: tuple[str, ...] = (f"rank {dead} on {socket.gethostname()}", f"last step {step}", death.word)
    if dead == 0 and _LOST_STORE in end:  # its last words went with the store that it kept; its own log has them
        wanted = (f"last step {step}",)
    found += [f"the other does not say {word!r}: {end[-300:]!r}" for word in wanted if word not in end]
    if death.code == 1 and death.word not in ranks.end_of(dead):
        found.append("the dead one's error is not in its last 20 lines")
    if left := ranks.left_behind():
        found.append(f"processes {left} are left")
    return found, seconds


def _for_ever() -> None:
    while True:
        pass


@ROWS.register("P2")
def check_hangs(scale: Scale, folder: Path) -> Row:
    """A rank stops, loops, or waits for a loader that hangs."""
    limit = 3
    draw = random.Random(2)
    kinds: Mapping[str, Fault | None] = {
        "stopped": at_step(7, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
        "in a loop": at_step(7, _for_ever),
        "loader stopped": at_step(7, _stop_the_loader),
    }
    problems, slowest = [], 0.0
    # Long enough that a stopped rank, woken to write its stacks, cannot bring the run to its end.
    flags = _flags(folder, "--hang_timeout", str(limit), "--total_steps", "5000")
    for number in range(20 if scale == "full" else 3):
        kind = list(kinds)[number % len(kinds)]
        rank = draw.randrange(2)
        output = folder / f"run-{number}"
        marker = folder / f"hangs-{number}"
        fault = kinds[kind]
        assert fault is not None
        more = ["--num_workers", "1", "--hang_timeout", "30"] if kind == "loader stopped" else []
        if kind == "loader stopped" and scale == "ci":
            continue  # its processes take long to start
        ranks = start_ranks([*flags, *more], output, faults={rank: _marked(fault, marker)})
        codes = ranks.wait(180)
        seconds = max(ranks.seconds.values()) - (marker.stat().st_mtime - time.time() + time.monotonic())
        found = []
        if not set(codes.values()) <= {7, -signal.SIGKILL} or 7 not in codes.values():
            found.append(f"exit codes {codes}")
        if seconds > (30 if more else limit) + 30:
            found.append(f"it ended after {seconds:.0f} s")
        stacks = sorted(path.name for path in Path(f"{output}.run").glob("stacks-rank-*.txt") if path.stat().st_size)
        if len(stacks) != 2:
            found.append(f"stacks: {stacks}")
        if not any("the run hangs" in ranks.text(each) or "has not answered" in ranks.text(each) for each in (0, 1)):
            found.append("nobody says that it hangs")
        if left := ranks.left_behind():
            found.append(f"processes {left} are left")
        problems.append([f"rank {rank} {kind}: {problem}" for problem in found])
        slowest = max(slowest, seconds)
    promised = "20 of 20 hangs end within the limit + 30 s, with the stacks of all ranks"
    return _counted("P2", promised, problems, f" hangs, slowest end after {slowest:.1f} s (limit {limit} s)")


def _marked(fault: Fault, marker: Path) -> Fault:
    """Leaves the time at which a process reached the step of its fault."""

    def marked() -> None:
        fault()
        at_step(7, marker.touch)()

    return marked


def _stop_the_loader() -> None:
    for pid in children(os.getpid()):
        os.kill(pid, signal.SIGSTOP)


@ROWS.register("P3")
def check_disagreements(scale: Scale, folder: Path) -> Row:
    """Rank 1 has other settings, data, sources, another seed or another number of processes."""
    flags = _flags(folder)
    other = runs.prepare("lm", folder / "other", _STEPS, 10, lines=300)
    other_store = other[other.index("--dataset_path") + 1]
    cases: Mapping[str, tuple[Sequence[str], Fault | None, Mapping[str, str], str]] = {
        "setting": (["--learning_rate", "0.5"], None, {}, "setting: learning_rate: 0.001 on rank 0, 0.5 on rank 1"),
        "seed": (["--seed", "8"], None, {}, "setting: seed: 7 on rank 0, 8 on rank 1"),
        "data": (["--dataset_path", other_store], None, {}, "content: dataset_path"),
        "sources": ([], _other_sources, {}, "software: sources"),
        "processes": ([], None, {"WORLD_SIZE": "3"}, "disagree on their number"),
    }
    started = {
        name: start_ranks(
            flags, folder / f"run-{name}", more={1: more}, faults={1: fault} if fault else None, environ={1: environ}
        )
        for name, (more, fault, environ, _) in cases.items()
    }
    problems = []
    for name, ranks in started.items():
        word = cases[name][3]
        codes = ranks.wait(90)
        found = [] if set(codes.values()) == {7} else [f"exit codes {codes}"]
        found += [f"rank {rank} does not say {word!r}" for rank in (0, 1) if word not in ranks.text(rank)]
        if (folder / f"run-{name}.run").exists():
            found.append("a step was made")
        problems.append([f"other {name}: {problem}" for problem in found])
    return _counted("P3", "every disagreement is found before step 1 and named on all ranks", problems, " kinds")


def _other_sources() -> None:
    from tencentpretrain.train import agreement

    agreement.source_hash = lambda: "0"  # type: ignore[assignment]


@ROWS.register("P4")
def check_slow_leader(scale: Scale, folder: Path) -> Row:
    """Rank 0 takes four times the limit for hangs to find its checkpoint, and again to save."""
    limit, delay, times = (5, 20, 20) if scale == "full" else (5, 11, 1)
    flags = _flags(folder, "--hang_timeout", str(limit), "--total_steps", "10")
    problems = []
    for number in range(times):
        output = folder / f"run-{number}"
        ranks = start_ranks(flags, output, faults={0: _slow(delay)})
        codes = ranks.wait(180)
        found = [] if codes == {0: 0, 1: 0} else [f"exit codes {codes}: {ranks.end_of(0, 3)} {ranks.end_of(1, 3)}"]
        if not found and not Path(f"{output}-10").is_file():
            found.append("no weights")
        problems.append(found)
    promised = "20 of 20 runs go on though rank 0 works on files for four times the limit for hangs"
    return _counted("P4", promised, problems, f" runs, {delay} s with a limit of {limit} s")


def _slow(seconds: float) -> Fault:
    def fault() -> None:
        from tencentpretrain.checkpoint.training import CheckpointFolder

        newest, save = CheckpointFolder.newest, CheckpointFolder.save

        def slow_newest(folder: CheckpointFolder) -> Path | None:
            time.sleep(seconds)
            return newest(folder)

        def slow_save(folder: CheckpointFolder, *arguments: object) -> Path:
            time.sleep(seconds)
            return save(folder, *arguments)  # type: ignore[arg-type]

        CheckpointFolder.newest = slow_newest  # type: ignore[method-assign, assignment]
        CheckpointFolder.save = slow_save  # type: ignore[method-assign, assignment]

    return fault


@ROWS.register("P5")
def check_meeting(scale: Scale, folder: Path) -> Row:
    """The port is in use, the master has no address, a process or rank 0 is missing, a rank is there twice."""
    limit, nowhere = 4, "no.such.host.invalid"
    flags = _flags(folder)
    flags[flags.index("--join_timeout") + 1] = str(limit)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        used = taken.getsockname()[1]
        free = free_port()
        cases: Mapping[str, tuple[Ranks, Mapping[int, tuple[int, str]]]] = {
            "port in use": (
                start_ranks(flags, folder / "used", ranks=[0], port=used),
                {0: (5, f"port {used} on")},
            ),
            "unknown master": (
                start_ranks(flags, folder / "unknown", environ={rank: {"MASTER_ADDR": nowhere} for rank in (0, 1)}),
                {0: (2, nowhere), 1: (2, nowhere)},
            ),
            "rank 2 missing": (
                start_ranks(flags, folder / "missing", 3, ranks=[0, 1], port=free),
                {0: (7, f"rank 2 of 3 did not come to localhost:{free}"), 1: (7, "rank 2 of 3 did not come")},
            ),
            "rank 0 missing": (
                start_ranks(flags, folder / "leaderless", ranks=[1]),
                {1: (7, "rank 0 is missing")},
            ),
        }  # fmt: skip
        problems = []
        for name, (ranks, wanted) in cases.items():
            began = time.monotonic()
            codes = ranks.wait(90)
            found = [f"it took {time.monotonic() - began:.0f} s"] if time.monotonic() - began > limit + 20 else []
            for rank, (code, word) in wanted.items():
                if codes[rank] != code or word not in ranks.end_of(rank):
                    found.append(f"rank {rank} ended with {codes[rank]}: {ranks.end_of(rank, 2)}")
            problems.append([f"{name}: {problem}" for problem in found])
    return _counted("P5", "each is told with its address and who is missing, in the time limit", problems, " kinds")


@ROWS.register("P6")
def check_restarts(scale: Scale, folder: Path) -> Row:
    """torchrun starts all ranks again when one was killed, and the end is that of a run left alone."""
    steps = 120 if scale == "full" else 30
    flags = [*_flags(folder, "--report_steps", "1"), "--total_steps", str(steps)]
    alone = folder / "alone"
    ranks = start_ranks(flags, alone)
    if set(ranks.wait(300).values()) != {0}:
        return Row(name="P6", promised="", reached=f"the run left alone failed: {ranks.end_of(0)}", passed=False)
    draw = random.Random(6)
    kills = 10 if scale == "full" else 1
    problems, killed = [], 0
    for number in range(5 if scale == "full" else 1):
        output = folder / f"run-{number}"
        arguments = [*flags, "--output_model_path", str(output)]
        agent = runs.start(partial(_elastic, restarts=kills), arguments, runs.log_of(output))
        struck = _kill_ranks(agent, output, sorted(draw.sample(range(2, steps - 2), kills)), draw)
        code = runs.wait(agent, 600)
        found = [] if code == 0 else [f"exit code {code}: {runs.log_of(output).read_text()[-300:]}"]
        found += [] if found else runs.differences(alone, output, steps)
        problems.append(found)
        killed += struck
    return _counted(
        "P6", "every run finishes, identical to the one left alone", problems, f" runs after {killed} kills"
    )


def _elastic(arguments: Sequence[str], restarts: int) -> int:
    """Runs `pretrain` on two ranks under torchrun's agent, in forks of this process."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="reliability",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.05,
        start_method="fork",
    )
    elastic_launch(config, _worker)(list(arguments))
    return 0


def _worker(arguments: Sequence[str]) -> None:
    code = runs.command("pretrain")(arguments)
    if code:
        sys.exit(code)


def _kill_ranks(agent: int, output: Path, steps: Sequence[int], draw: random.Random) -> int:
    """Kills a random rank at each of some steps; returns how many were met."""
    struck = 0
    for step in steps:
        runs.wait_for_step(output, step, agent, 120)
        found = [pid for pid in children(agent) if _is_rank(pid)]
        if found:
            os.kill(draw.choice(found), signal.SIGKILL)
            struck += 1
            time.sleep(0.5)
    return struck


def _is_rank(pid: int) -> bool:
    try:
        return b"TORCHELASTIC_RUN_ID" in Path(f"/proc/{pid}/environ").read_bytes() or len(children(pid)) == 0
    except OSError:
        return False
