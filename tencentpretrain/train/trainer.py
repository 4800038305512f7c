"""The training loop."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tencentpretrain.config.train import TrainConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.engines.base import Engine, Losses, MicroStep
from tencentpretrain.errors import NonFiniteError, NonFiniteGradientError, ResourceError
from tencentpretrain.model import Model
from tencentpretrain.optim.build import set_learning_rate
from tencentpretrain.targets.base import LossValue
from tencentpretrain.train.labels import count_labels
from tencentpretrain.train.metrics import Meter, Timing, loss_fields, report_line
from tencentpretrain.train.non_finite import find_source
from tencentpretrain.train.signals import StopRequest

logger = logging.getLogger(__name__)

MOST_SKIPPED = 5
"""Updates in a row that may be skipped because a number is not finite."""


class BatchSource(Protocol):
    """An endless stream of batches that knows where it stands; `data.loader.Loader` is one."""

    position: int
    waiting_seconds: float

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one update did.

    Fields:
        values: the losses of each micro-batch, by name.
        tokens: real tokens of all micro-batches, over all processes.
        gradient_norm: before clipping.
        updated: False if the update was skipped because the loss scale was too large.
    """

    values: Sequence[Mapping[str, LossValue]]
    tokens: int
    gradient_norm: float
    updated: bool


Divisors = Callable[[Sequence[Batch]], Sequence[Mapping[str, float]]]
"""Returns for each micro-batch of an update what its loss sums are divided by."""


class Recorder(Protocol):
    """Where the loop's results go; `train.pretraining.RunRecorder` writes them into the run folder."""

    def report(self, step: int, values: Mapping[str, Any], line: str, timing: Timing, rate: float) -> None:
        """Takes a training report."""
        ...

    def validation(self, step: int, values: Mapping[str, Any], line: str) -> None:
        """Takes a validation report."""
        ...

    def save(self, trainer: Trainer, weights_names: Sequence[int]) -> None:
        """Publishes a checkpoint, and the weights under the given step numbers."""
        ...

    def progress(self, step: int) -> None:
        """Hears of every update."""
        ...


class Trainer:
    """Trains a model on batches.

    A micro-step is one batch; an update takes the gradient of `accumulation_steps` of them (the last one perhaps of
    fewer). Learning rate and updates go by updates; step numbers, as published, by micro-steps.

    Args:
        model, optimizer, engine: what is trained, how, where.
        learning_rate: the rate of an update, from the number of earlier ones.
        batches: where training stands is `batches.position`.
        config: lengths and intervals.
        seed: of dropout; every micro-step has random numbers of its own, so nothing random needs saving.
        max_grad_norm: clips the gradient's global norm.
        validate: returns the values of a validation, or None if there is none.
        divisors: replaces the division by the labels of the whole update.
    """

    def __init__(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer,
        engine: Engine,
        *,
        learning_rate: Callable[[int], float],
        batches: BatchSource,
        config: TrainConfig,
        recorder: Recorder,
        seed: int = 7,
        max_grad_norm: float | None = None,
        validate: Callable[[], Mapping[str, Any]] | None = None,
        divisors: Divisors | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.engine = engine
        self.learning_rate = learning_rate
        self.batches = batches
        self.config = config
        self.recorder = recorder
        self.seed = seed
        self.max_grad_norm = max_grad_norm
        self.validate = validate
        self.divisors = divisors or self._divide_by_labels_of_update
        self.step = 0
        self.updates = 0
        self.skipped_in_row = 0
        self.meter = Meter()

    def fit(self, stop: StopRequest) -> None:
        """Trains to the last step, or until a stop is asked for; saves in both cases.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the weights are those before that update.
        """
        total = self.config.total_steps
        stream = iter(self.batches)
        self.model.train()
        clock = _Clock(self.step, self.batches)
        while self.step < total and not stop.agreed(self.engine.any_rank):
            first_sample = self.batches.position
            try:
                window = [next(stream) for _ in range(min(self.config.accumulation_steps, total - self.step))]
            except ResourceError:
                if stop.number is None or self.engine.world_size > 1:
                    raise
                self.batches.position = first_sample  # the signal went to the loader's processes too
                break
            report = self.train_step(window, first_sample)
            before, self.step = self.step, self.step + len(window)
            self.meter.add(report.values, report.tokens, report.gradient_norm if report.updated else None)
            self.updates += 1
            self.recorder.progress(self.step)
            if self._passed(before, self.config.report_steps) or self.step == total:
                self._report(clock)
            if self.validate and (self._passed(before, self._eval_steps) or self.step == total):
                clock.pause(self._validate)
            if names := self._names_to_save():
                clock.pause(lambda names=names: self.recorder.save(self, names))  # type: ignore[misc]
        if self.step < total:
            logger.info("stopped by %s after step %d; saving", stop.name or "another process", self.step)
            self.recorder.save(self, ())

    def train_step(self, window: Sequence[Batch], first_sample: int = 0) -> StepReport:
        """Takes one update over its micro-batches.

        Args:
            window: the micro-batches, on the host.
            first_sample: global index of the first sample, for messages.
        """
        divisors = self.divisors(window)
        tokens = self.engine.sum_over_ranks({"tokens": sum(batch.token_count for batch in window)})["tokens"]
        set_learning_rate(self.optimizer, self.learning_rate(self.updates))
        steps = [
            MicroStep(
                batch=batch, divisor=divisor, seed=step_seed(self.seed, self.step + number, self.engine.data_rank)
            )
            for number, (batch, divisor) in enumerate(zip(window, divisors, strict=True))
        ]
        losses = self.engine.accumulate(self.model, steps)
        try:
            update = self.engine.update(
                self.optimizer,
                losses,
                max_norm=self.max_grad_norm,
                inspect=lambda values: self._require_finite(values, window, first_sample),
            )
        except NonFiniteGradientError as error:
            found = NonFiniteError(self._gradient_message(window, first_sample))
            return self._without_update(found, steps, int(tokens), error)
        except NonFiniteError as error:
            ranks = self._ranks_of(losses)
            where = f" (on data rank {', '.join(map(str, ranks))})" if self.engine.data_size > 1 else ""
            found = NonFiniteError(f"{error}{where}")
            return self._without_update(found, steps, int(tokens), error, here=self.engine.data_rank in ranks)
        self.skipped_in_row = 0
        return StepReport(
            values=update.values, tokens=int(tokens), gradient_norm=update.gradient_norm, updated=update.applied
        )

    def _ranks_of(self, losses: Losses) -> list[int]:
        """Returns the data ranks whose own losses are not finite. Collective."""
        bad = any(not math.isfinite(float(loss.total)) for values in losses for loss in values.values())
        ranks = range(self.engine.data_size)
        found = self.engine.sum_over_ranks({str(rank): bad and rank == self.engine.data_rank for rank in ranks})
        return [rank for rank in ranks if found[str(rank)]]

    def _without_update(
        self,
        error: NonFiniteError,
        steps: Sequence[MicroStep],
        tokens: int,
        cause: NonFiniteError,
        *,
        here: bool = True,
    ) -> StepReport:
        """Names the source of numbers that are not finite; goes on without the update if that was asked for.

        Args:
            here: whether they came up on this process.
        """
        self.optimizer.zero_grad(set_to_none=True)
        source = find_source(self.model, self.engine, steps)  # on all processes: it may be collective
        found = NonFiniteError(f"{error}; {source}") if here else error
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.on_non_finite == "stop":
            raise found from cause
        self.skipped_in_row += 1
        if self.skipped_in_row > MOST_SKIPPED:
            raise NonFiniteError(f"{found}; the {MOST_SKIPPED} updates before it were skipped too") from cause
        logger.warning("%s; this update is skipped", found)
        return StepReport(values=(), tokens=tokens, gradient_norm=math.nan, updated=False)

    def state(self) -> dict[str, Any]:
        """Returns where the loop stands, as plain JSON that later steps do not change."""
        return {
            "updates": self.updates,
            "skipped_in_row": self.skipped_in_row,
            "position": self.batches.position,
            "meter": copy.deepcopy(vars(self.meter)),
            "engine": self.engine.state(),
            "world_size": self.engine.world_size,
            "data_size": self.engine.data_size,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved state; `batches` must have been made to start at its position."""
        self.step = state["step"]
        self.updates = state["updates"]
        self.skipped_in_row = state.get("skipped_in_row", 0)
        self.meter = Meter(**state["meter"])
        self.engine.load_state(state["engine"])

    def _divide_by_labels_of_update(self, window: Sequence[Batch]) -> Sequence[Mapping[str, float]]:
        """One division by all labels of the update, so that the loss does not depend on how it was cut."""
        counts = self.engine.sum_over_ranks(count_labels(window, self.model.config))
        return [counts] * len(window)

    @property
    def _eval_steps(self) -> int:
        return self.config.eval_steps or self.config.save_checkpoint_steps

    def _passed(self, before: int, interval: int) -> bool:
        """Whether the last update reached or passed a multiple of `interval`."""
        return self.step // interval > before // interval

    def _names_to_save(self) -> list[int]:
        """The steps whose weights are those after this update.

        A step in the middle of an update has the weights from before it.
        """
        total, interval = self.config.total_steps, self.config.save_checkpoint_steps
        if self.step == total:
            return [total]
        following = min(self.step + self.config.accumulation_steps, total)
        return [step for step in range(self.step, following) if step % interval == 0]

    def _report(self, clock: _Clock) -> None:
        values = self.meter.summary()
        timing = clock.timing(self.step, self.config.total_steps, self.meter.tokens)
        rate = self.learning_rate(self.updates - 1)
        line = report_line(self.step, self.config.total_steps, values, rate, timing)
        self.recorder.report(self.step, values, line, timing, rate)
        self.meter = Meter()

    def _validate(self) -> None:
        assert self.validate is not None
        values = self.validate()
        self.model.train()
        line = "|".join([f"| {self.step:8d}/{self.config.total_steps:8d} steps", " validation", *loss_fields(values)])
        self.recorder.validation(self.step, values, line)

    def _require_finite(
        self, values: Sequence[Mapping[str, LossValue]], window: Sequence[Batch], first_sample: int
    ) -> None:
        for number, losses in enumerate(values):
            bad = [name for name, value in losses.items() if not math.isfinite(value.total)]
            if bad:
                step = self.step + number + 1
                samples = self._samples(window[: number + 1], first_sample)
                raise NonFiniteError(
                    f"step {step}: the loss {', '.join(bad)} is not finite for {samples}; the weights are those of "
                    f"step {self.step}. Look at these samples, lower --learning_rate or set --max_grad_norm"
                )

    def _gradient_message(self, window: Sequence[Batch], first_sample: int) -> str:
        bad = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        step = self.step + len(window)
        return (
            f"step {step}: the gradient is not finite (first in {', '.join(bad[:3])}{more}) for "
            f"{self._samples(window, first_sample, whole=True)}; the weights are those of step {self.step}. "
            "Lower --learning_rate or set --max_grad_norm"
        )

    def _samples(self, window: Sequence[Batch], first_sample: int, *, whole: bool = False) -> str:
        """Names the samples of a window's last batch, or of the whole window, by their global index."""
        world = self.engine.data_size
        end = first_sample + sum(batch.size for batch in window) * world
        begin = first_sample if whole else end - window[-1].size * world
        return f"samples {begin} to {end - 1}"


def step_seed(seed: int, step: int, rank: int) -> int:
    """Returns the seed of dropout for a micro-step and process."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _Clock:
    """Measures speed and waiting between reports, leaving out saving and validation."""

    def __init__(self, step: int, batches: BatchSource) -> None:
        self._batches = batches
        self._first_step = step
        self._spent = 0.0
        self._paused = 0.0
        self._restart()

    def _restart(self) -> None:
        self._began = time.perf_counter()
        self._waited = self._batches.waiting_seconds
        self._paused = 0.0

    def pause(self, work: Callable[[], None]) -> None:
        began = time.perf_counter()
        work()
        self._paused += time.perf_counter() - began

    def timing(self, step: int, total_steps: int, tokens: int) -> Timing:
        seconds = max(time.perf_counter() - self._began - self._paused, 1e-9)
        waited = self._batches.waiting_seconds - self._waited
        self._spent += seconds
        done = max(step - self._first_step, 1)
        self._restart()
        return Timing(
            tokens_per_second=tokens / seconds,
            data_wait=min(waited / seconds, 1.0),
            remaining_seconds=self._spent / done * (total_steps - step),
        )
