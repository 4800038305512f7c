"""Writes a run's reports and checkpoints into its folder, and shows them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from tencentpretrain.checkpoint.files import Format, write_tensors
from tencentpretrain.checkpoint.training import TrainingState, byte_size, require_space
from tencentpretrain.errors import ResourceError
from tencentpretrain.train.metrics import Timing
from tencentpretrain.train.plot import plot_losses
from tencentpretrain.train.run_folder import RunFolder
from tencentpretrain.train.trainer import Trainer

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_PLOTS = 60.0


class Board(Protocol):
    """A TensorBoard writer."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def flush(self) -> None: ...


class RunRecorder:
    """Records into a run folder.

    Args:
        folder: where to.
        weights: returns the tensors to publish under `<output_model_path>-<step>`.
        model_format: their form.
        identity: configuration and fingerprints, kept in every checkpoint.
        board: TensorBoard writer.
        bar: shows each update.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        weights: Callable[[], Mapping[str, Tensor]],
        model_format: Format,
        identity: Mapping[str, Any],
        board: Board | None = None,
        bar: ProgressBar | None = None,
    ) -> None:
        self.folder = folder
        self.weights = weights
        self.model_format = model_format
        self.identity = identity
        self.board = board
        self.bar = bar
        self._plotted = time.monotonic()

    def report(self, step: int, values: Mapping[str, Any], line: str, timing: Timing, rate: float) -> None:
        logger.info(line)
        self.folder.metrics.append({"kind": "train", "step": step, "lr": rate, **values, "timing": vars(timing)})
        self._to_board("train", step, {**_scalars(values), "lr": rate, "tokens_per_second": timing.tokens_per_second})

    def validation(self, step: int, values: Mapping[str, Any], line: str) -> None:
        logger.info(line)
        self.folder.metrics.append({"kind": "validation", "step": step, **values})
        self._to_board("validation", step, _scalars(values))

    def save(self, trainer: Trainer, weights_names: Sequence[int]) -> None:
        """Publishes weights first, then the checkpoint: a run that ends in between repeats the steps since the last."""
        self.folder.metrics.sync()
        snapshot = trainer.engine.snapshot(trainer.model, trainer.optimizer)
        state = TrainingState(
            model=snapshot.model, optimizer=snapshot.optimizer, values={**self.identity, **trainer.state()}
        )
        weights = self.weights()
        needed = byte_size(state.model) + byte_size(state.optimizer) + len(weights_names) * byte_size(weights)
        require_space(self.folder.path, needed)
        for step in weights_names:
            write_tensors(self.folder.weights_path(step), weights, self.model_format)
        path = self.folder.checkpoints.save(trainer.step, state)
        names = ", ".join(str(self.folder.weights_path(step)) for step in weights_names)
        logger.info("step %d: saved %s%s", trainer.step, f"{names} and " if names else "", path)
        if time.monotonic() - self._plotted > _SECONDS_BETWEEN_PLOTS:
            self.plot()

    def progress(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step)

    def plot(self) -> None:
        """Draws loss.png."""
        try:
            plot_losses(self.folder.metrics.records(), self.folder.path / "loss.png")
        except OSError as error:
            raise ResourceError(f"{self.folder.path / 'loss.png'}: cannot be written ({error.strerror})") from error
        self._plotted = time.monotonic()

    def _to_board(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)
            self.board.flush()


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    nested = {f"loss_{name}": loss for name, loss in values["losses"].items()}
    nested |= {f"accuracy_{name}": accuracy for name, accuracy in values["accuracies"].items()}
    plain = {name: values[name] for name in ("loss", "grad_norm", "perplexity") if name in values}
    return nested | plain


class ProgressBar:
    """A bar with the time left on a terminal; log lines appear above it."""

    def __init__(self, total_steps: int, step: int = 0) -> None:
        self.console = Console(stderr=True)
        self.handler = RichHandler(
            console=self.console, show_time=False, show_level=False, show_path=False, markup=False
        )
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=step)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, step: int) -> None:
        self._bar.update(self._task, completed=step)
