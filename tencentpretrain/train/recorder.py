"""Writes a run's reports and checkpoints into its folder, and shows them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tencentpretrain.checkpoint.background import BackgroundWriter
from tencentpretrain.checkpoint.encoding import Format
from tencentpretrain.checkpoint.training import Publication, TrainingState
from tencentpretrain.errors import ResourceError
from tencentpretrain.train.metrics import Timing
from tencentpretrain.train.peers import Peers
from tencentpretrain.train.plot import plot_losses
from tencentpretrain.train.run_folder import RunFolder
from tencentpretrain.train.trainer import Trainer

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_PLOTS = 60.0
_SECONDS_FOR_PEERS = 8.0
"""How long a save still waits for the parts of other processes when training has failed."""


class Board(Protocol):
    """A TensorBoard writer."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def flush(self) -> None: ...


class RunRecorder:
    """Records into a run folder; when its `with` block ends, the last save is finished.

    Args:
        folder: where to.
        published: which weights go into `<output_model_path>-<step>`.
        model_format: their form.
        async_save: write checkpoints while training goes on.
        identity: configuration and fingerprints, kept in every checkpoint.
        peers: the processes of the run; the leader alone writes reports.
        board: TensorBoard writer.
        bar: shows each update.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        published: Callable[[str], bool],
        model_format: Format,
        async_save: bool = False,
        identity: Mapping[str, Any],
        peers: Peers | None = None,
        board: Board | None = None,
        bar: ProgressBar | None = None,
    ) -> None:
        self.folder = folder
        self.published = published
        self.model_format = model_format
        self.async_save = async_save
        self.identity = identity
        self.peers = peers or Peers()
        self.board = board
        self.bar = bar
        self._plotted = time.monotonic()
        self._background = BackgroundWriter()

    def report(self, step: int, values: Mapping[str, Any], line: str, timing: Timing, rate: float) -> None:
        if not self.peers.leads:
            return
        logger.info(line)
        self.folder.metrics.append({"kind": "train", "step": step, "lr": rate, **values, "timing": vars(timing)})
        self._to_board("train", step, {**_scalars(values), "lr": rate, "tokens_per_second": timing.tokens_per_second})

    def validation(self, step: int, values: Mapping[str, Any], line: str) -> None:
        if not self.peers.leads:
            return
        logger.info(line)
        self.folder.metrics.append({"kind": "validation", "step": step, **values})
        self._to_board("validation", step, _scalars(values))

    def save(self, trainer: Trainer, weights_names: Sequence[int]) -> None:
        """Publishes weights first, then the checkpoint: a run that ends in between repeats the steps since the last.

        Only the copies are made here if saving goes on in the background; the save before is waited for.
        """
        self.finish()
        checkpoints, step = self.folder.checkpoints, trainer.step
        if self.peers.leads:
            self.folder.metrics.sync()
        snapshot = trainer.engine.snapshot(trainer.model, trainer.optimizer)
        state = TrainingState(
            model=snapshot.model, optimizer=snapshot.optimizer, values={**self.identity, **trainer.state()}
        )
        publication = Publication(
            paths=[self.folder.weights_path(number) for number in weights_names],
            form=self.model_format,
            order=list(trainer.engine.layout.tensors(trainer.model)),
            chosen=self.published,
        )

        def work() -> None:
            path = checkpoints.save(step, state, publication)
            if self.peers.leads:
                names = ", ".join(map(str, publication.paths))
                logger.info("step %d: saved %s%s", step, f"{names} and " if names else "", path)

        if self.async_save:
            self._background.submit(work)
        else:
            with self.peers.file_work("saving"):
                work()
        if self.peers.leads and time.monotonic() - self._plotted > _SECONDS_BETWEEN_PLOTS:
            self.plot()

    def finish(self) -> None:
        """Waits for the running save.

        Raises:
            ResourceError, PeerError: it failed.
        """
        with self.peers.file_work("saving"):
            self._background.finish()

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Finishes the running save also when training failed; then its own failure is only logged."""
        if kind is None:
            self.finish()
            return
        self.folder.checkpoints.hurry(_SECONDS_FOR_PEERS)
        try:
            self.finish()
        except Exception as failure:
            if failure is not error:
                logger.error("the last save failed too: %s", failure)

    def progress(self, step: int) -> None:
        self._background.check()
        self.peers.progress(step)
        if self.bar is not None:
            self.bar.update(step)

    def plot(self) -> None:
        """Draws loss.png."""
        try:
            with self.peers.file_work("drawing"):
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
