"""R1, R19: runs killed at random moments and restarted end as a run that was left alone."""

from __future__ import annotations

import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tencentpretrain.checkpoint.training import CheckpointFolder
from tencentpretrain.errors import ResourceError
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs
from tencentpretrain.reliability.row import Row, Scale
from tencentpretrain.train.metrics import MetricsFile


@dataclass(frozen=True, kw_only=True)
class Account:
    """What happened to one objective.

    Fields:
        kills: SIGKILLs that met a living run.
        kills_in_training: those aimed at the time after the first report; the others strike while a run starts.
        runs: runs that were brought to their end through kills.
        identical: how many of them ended in the bytes and metrics of the run left alone.
        lost_steps: most steps between the last report of a killed run and its newest checkpoint.
        differences: where a run ended otherwise.
    """

    objective: str
    kills: int
    kills_in_training: int
    runs: int
    identical: int
    lost_steps: int
    differences: tuple[str, ...]

    def __str__(self) -> str:
        text = (
            f"{self.objective}: {self.kills} kills ({self.kills_in_training} in training), {self.identical} of "
            f"{self.runs} interrupted runs ended in the same bytes and metrics, at most {self.lost_steps} steps lost"
        )
        return "\n  ".join([text, *self.differences])


def kill_and_compare(
    objective: str, folder: Path, *, steps: int, save_steps: int, kills: int, kills_per_run: int = 1, seed: int = 0
) -> Account:
    """Trains once undisturbed, then again and again under SIGKILL until `kills` have struck.

    Args:
        objective: a key of OBJECTIVES.
        folder: an empty folder for the data and all runs.
        steps, save_steps: length of a run and distance of its checkpoints.
        kills: how many.
        kills_per_run: after so many, a run is left to reach its end.
        seed: of the moments.
    """
    draw = random.Random(f"{objective}/{seed}")
    common = runs.prepare(objective, folder, steps, save_steps)
    pretrain, alone = runs.command("pretrain"), folder / "alone"
    began = time.monotonic()
    arguments = [*common, "--output_model_path", str(alone), "--num_workers", "0"]
    process = runs.start(pretrain, arguments, runs.log_of(alone))
    runs.wait_for_step(alone, 1, process)
    ready = time.monotonic() - began
    status = runs.wait(process)
    training = time.monotonic() - began - ready
    if status:
        raise ResourceError(
            f"the run left alone ended with exit code {status}:\n{runs.log_of(alone).read_text(encoding='utf-8')}"
        )
    struck = trained = number = identical = lost = 0
    found: list[str] = []
    while struck < kills:
        number += 1
        output = folder / f"killed-{number}"
        arguments = [*common, "--output_model_path", str(output)]
        left = min(kills_per_run, kills - struck)
        while True:
            process = runs.start(pretrain, arguments, runs.log_of(output))
            # A fifth of the kills strike while the run starts, the others within the next four saves.
            starting = draw.random() < 0.2
            moment = draw.random() * (ready if starting else training * min(1.0, 4 * save_steps / steps))
            status = runs.wait(process, None if left == 0 else moment if starting else ready + moment)
            if status != -signal.SIGKILL:
                break
            left -= 1
            struck += 1
            trained += not starting
            lost = max(lost, _lost_steps(output))
        wrong = runs.differences(alone, output, steps)
        if status:
            wrong.append(f"exit code {status}")
        identical += not wrong
        found += [f"run {number}: {difference}" for difference in wrong]
    return Account(
        objective=objective,
        kills=struck,
        kills_in_training=trained,
        runs=number,
        identical=identical,
        lost_steps=lost,
        differences=tuple(found),
    )


@ROWS.register("R1")
def check_kills(scale: Scale, folder: Path) -> Row:
    """SIGKILL at random moments, in training and while a run starts."""
    steps, save_steps = (300, 20) if scale == "full" else (60, 10)
    counts = {"mlm": 34, "lm": 33, "t5": 33} if scale == "full" else {"lm": 2}
    accounts = [
        kill_and_compare(
            objective, folder / objective, steps=steps, save_steps=save_steps, kills=kills, kills_per_run=4
        )
        for objective, kills in counts.items()
    ]
    identical, total = sum(account.identical for account in accounts), sum(account.runs for account in accounts)
    lost = max(account.lost_steps for account in accounts)
    wrong = [difference for account in accounts for difference in account.differences]
    return Row(
        name="R1",
        promised="100 random kills over mlm, lm, t5: every run ends identical; lost work at most one save interval",
        reached=(
            f"{sum(account.kills for account in accounts)} kills ({', '.join(counts)}), {identical}/{total} "
            f"interrupted runs identical; at most {lost} of {save_steps} steps lost"
            + "".join(f"; {text}" for text in wrong[:3])
        ),
        # A kill may fall between the report of a step and its checkpoint: one report interval more can show.
        passed=identical == total and lost <= save_steps + 3,
    )


@ROWS.register("R19")
def check_metrics(scale: Scale, folder: Path) -> Row:
    """The metrics of interrupted runs, and of a file cut at any byte."""
    total, cuts = (30, None) if scale == "full" else (12, 40)
    flags = [*runs.prepare("lm", folder, total, 5), "--num_workers", "0", "--report_steps", "1", "--seed", "3"]
    alone = folder / "alone"
    runs.train_alone(flags, alone, "--save_total_limit", "0")
    expected = runs.timeless_metrics(alone)
    steps = [record["step"] for record in expected if record["kind"] == "train"]
    once = steps == list(range(1, total + 1))
    content = (Path(f"{alone}.run") / "metrics.jsonl").read_bytes()
    places: list[int] = list(range(len(content) + 1))
    if cuts:
        places = sorted(random.Random(1).sample(places, cuts))
    torn = 0
    for place in places:  # the file as a crash leaves it, continued from the checkpoint of step 5
        file = MetricsFile(folder / "torn.jsonl")
        file.path.write_bytes(content[:place] if place % 2 else content[:place] + b'{"kind": "tr')
        whole = file.records()
        file.rewind(5)
        torn += file.records() == [record for record in whole if record["step"] <= 5]
        for line in content.splitlines(keepends=True)[len(file.records()) :]:
            with file.path.open("ab") as opened:
                opened.write(line)
        torn -= file.path.read_bytes() != content
    continued = 0
    points = [5, 10, 15, 20, 25] if scale == "full" else [5]
    for point in points:  # whole runs that lost their newest checkpoints and part of a line
        output = folder / f"back-to-{point}"
        runs.copy_run(alone, output)
        checkpoints = CheckpointFolder(runs.checkpoints_of(output))
        for step in checkpoints.steps():
            if step > point:
                shutil.rmtree(checkpoints.path(step))
        metrics = Path(f"{output}.run") / "metrics.jsonl"
        metrics.write_bytes(content[: len(content) * (point + 3) // total])
        continued += runs.train(flags, output, "--save_total_limit", "0") == 0 and (
            runs.timeless_metrics(output) == expected
        )
    return Row(
        name="R19",
        promised="each step exactly once in metrics.jsonl, no gap, valid JSON lines, a torn last line repaired: 100 %",
        reached=(
            f"{torn}/{len(places)} files cut at any byte and continued are whole again; {continued}/{len(points)} "
            f"restarted runs have {len(expected)} records, each step once"
        ),
        passed=once and torn == len(places) and continued == len(points),
    )


def _lost_steps(output: Path) -> int:
    saved = max(CheckpointFolder(runs.checkpoints_of(output)).steps(), default=0)
    return max(0, runs.reported_step(output) - saved)
