"""A model with a head from its parts, and its logits for every row of a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.errors import ConfigError, NonFiniteError
from tencentpretrain.layers.initialization import SkipDefaults, initialize
from tencentpretrain.model import build_model
from tencentpretrain.tasks.examples import Examples, batches_by_length
from tencentpretrain.tasks.heads import TaskModel

if TYPE_CHECKING:
    from tencentpretrain.config.model import ModelConfig
    from tencentpretrain.tasks.base import Task
    from tencentpretrain.tokenizers.base import Tokenizer


def build_task_model(task: Task, config: ModelConfig, tokenizer: Tokenizer, *, seed: int = 0) -> TaskModel:
    """Returns body and head of a task with random weights.

    Raises:
        ConfigError: the parts do not fit together, or rows may be longer than the position table.
    """
    with SkipDefaults():
        body = build_model(task.body_config(config), tokenizer.vocab_size, pad_id=tokenizer.pad_id, initialize=False)
        model = TaskModel(body, task.build_head(config))
    initialize(model, generator=torch.Generator().manual_seed(seed))
    return model


def refuse(problems: Iterable[str]) -> None:
    """Raises ConfigError with all problems, if there are any."""
    found = tuple(problems)
    if found:
        raise ConfigError(found)


def batch_width(config: ModelConfig, seq_length: int) -> int | None:
    """Returns how wide batches must be: None (as wide as the longest row) where padding cannot change the numbers.

    Recurrent and convolutional encoders read padding like text, so their rows always have full length.
    """
    return None if config.encoder == "transformer" else seq_length


@torch.inference_mode()
def predict_logits(
    model: TaskModel,
    examples: Examples,
    *,
    batch_size: int,
    pad_id: int,
    width: int | None,
    engine: LocalEngine,
) -> NDArray[np.float32]:
    """Returns the logits (N, labels) of all rows in the order of the table; processes share the work. Collective."""
    model.eval()
    rows: list[NDArray[np.int64]] = []
    parts: list[torch.Tensor] = []
    for number, indices in enumerate(batches_by_length(examples.lengths, batch_size)):
        if number % engine.data_size != engine.data_rank:
            continue
        batch = examples.batch(indices, pad_id=pad_id, width=width).to(engine.device)
        with engine.autocast():
            parts.append(model(batch).float())
        rows.append(indices)
    found = [] if not parts else [(np.concatenate(rows), torch.cat(parts).cpu().numpy())]
    shares = [share for process in engine.gather(found) for share in process]
    logits = np.empty((len(examples), shares[0][1].shape[1]), np.float32)
    for indices, values in shares:
        logits[indices] = values
    return logits


def refuse_non_finite(logits: NDArray[np.float32], what: str) -> None:
    """Refuses to measure or write predictions that are no numbers.

    Raises:
        NonFiniteError: with the number of rows.
    """
    wrong = int((~np.isfinite(logits)).any(axis=1).sum())
    if wrong:
        raise NonFiniteError(f"{what}: the model's logits are not finite in {wrong} of {len(logits)} rows")
