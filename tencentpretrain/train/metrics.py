"""What a run reports: sums over the steps since the last report, the report line, and `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tencentpretrain import faults
from tencentpretrain.data.durable import storage_errors, write_durably
from tencentpretrain.targets.base import LossValue


@dataclass
class Meter:
    """Sums since the last report, exact enough to be saved and continued.

    Fields:
        losses: by name, the sum of the micro-batches' mean losses.
        correct, counts: by name, right predictions and labels.
        micro_steps, updates, skipped, tokens: how many there were.
        gradient_norm: sum over the updates.
    """

    losses: dict[str, float] = field(default_factory=dict)
    correct: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    micro_steps: int = 0
    updates: int = 0
    skipped: int = 0
    tokens: int = 0
    gradient_norm: float = 0.0

    def add(self, batches: Sequence[Mapping[str, LossValue]], tokens: int, gradient_norm: float | None) -> None:
        """Adds an update; `gradient_norm` is None if it was skipped because the loss scale was too large."""
        for losses in batches:
            for name, value in losses.items():
                self.losses[name] = self.losses.get(name, 0.0) + value.mean
                self.counts[name] = self.counts.get(name, 0) + value.count
                if value.correct is not None:
                    self.correct[name] = self.correct.get(name, 0) + value.correct
        self.micro_steps += len(batches)
        self.tokens += tokens
        if gradient_norm is None:
            self.skipped += 1
        else:
            self.updates += 1
            self.gradient_norm += gradient_norm

    def summary(self) -> dict[str, Any]:
        """Returns the means as they stand in `metrics.jsonl`."""
        losses = {name: total / max(self.micro_steps, 1) for name, total in self.losses.items()}
        return summarize(losses, self.correct, self.counts) | {
            "grad_norm": self.gradient_norm / max(self.updates, 1),
            "skipped_updates": self.skipped,
            "tokens": self.tokens,
        }


def summarize(losses: Mapping[str, float], correct: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, Any]:
    """Returns losses, accuracies and, for language modelling, the perplexity."""
    values: dict[str, Any] = {"loss": sum(losses.values()) if losses else math.nan, "losses": dict(losses)}
    values["accuracies"] = {name: right / max(counts[name], 1) for name, right in correct.items()}
    if set(losses) == {"lm"}:
        values["perplexity"] = math.exp(min(losses["lm"], 700.0))
    return values


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How fast a reporting interval was.

    Fields:
        tokens_per_second: real tokens of all processes.
        data_wait: share of the time spent waiting for data.
        remaining_seconds: estimate for the rest of the run.
    """

    tokens_per_second: float
    data_wait: float
    remaining_seconds: float


def report_line(step: int, total_steps: int, values: Mapping[str, Any], rate: float, timing: Timing) -> str:
    """Returns the line for people: the published fields, then learning rate, gradient norm, waiting and time left."""
    fields = [f"| {step:8d}/{total_steps:8d} steps", f" {timing.tokens_per_second:8.2f} tokens/s"]
    fields += loss_fields(values)
    fields += [
        f" lr: {rate:.3e}",
        f" grad_norm: {values['grad_norm']:3.3f}",
        f" data_wait: {timing.data_wait:.1%}",
        f" eta: {duration(timing.remaining_seconds)}",
    ]
    if values["skipped_updates"]:
        fields.append(f" skipped: {values['skipped_updates']}")
    return "|".join(fields)


def loss_fields(values: Mapping[str, Any]) -> list[str]:
    """Returns loss and accuracy fields; a single loss needs no name."""
    losses, accuracies = values["losses"], values["accuracies"]
    fields = [f" loss {values['loss']:7.2f}"]
    if len(losses) > 1:
        fields += [f" loss_{_short(name)}: {loss:3.3f}" for name, loss in losses.items()]
        fields += [f" acc_{_short(name)}: {accuracy:3.3f}" for name, accuracy in accuracies.items()]
    else:
        fields += [f" acc: {accuracy:3.3f}" for accuracy in accuracies.values()]
    if "perplexity" in values:
        fields.append(f" ppl: {values['perplexity']:.3f}")
    return fields


def _short(name: str) -> str:
    return name.removeprefix("bilm_")


def duration(seconds: float) -> str:
    """Returns 1:02:03 for 3723 seconds."""
    whole = max(0, round(seconds)) if math.isfinite(seconds) else 0
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class MetricsFile:
    """`metrics.jsonl`: one JSON object per report, each step once however often the run was interrupted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Drops what was written after `step`, and a line that was cut off."""
        kept = [line for line, record in self._lines() if record["step"] <= step]
        with storage_errors(self.path, sum(map(len, kept))):
            write_durably(self.path, b"".join(kept))

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record."""
        line = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        with storage_errors(self.path, len(line)):
            faults.reach("metrics.open", self.path)
            with self.path.open("ab", buffering=0) as file:
                faults.write("metrics.write", file, line, self.path)

    def sync(self) -> None:
        """Makes all records survive a power cut; called before a checkpoint that relies on them."""
        if self.path.exists():
            with storage_errors(self.path, 0), self.path.open("rb") as file:
                faults.reach("metrics.sync", self.path)
                os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """Returns all whole records."""
        return [record for _, record in self._lines()]

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        if not self.path.exists():
            return
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON lacks by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
