"""All targets of a model, under their registered names."""

from __future__ import annotations

from torch import nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch, Stream
from tencentpretrain.errors import DataFormatError
from tencentpretrain.registry import TARGETS
from tencentpretrain.targets.base import LossSum


class Targets(nn.Module):
    """Runs each target and joins their losses."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, pad_id: int = 0) -> None:
        super().__init__()
        self.names = tuple(TARGETS.canonical(name) for name in config.target)
        for name in self.names:
            self.add_module(name, TARGETS.get(name)(config, vocab_size, pad_id=pad_id))

    def forward(self, hidden: Stream, batch: Batch, segment_ids: Stream) -> dict[str, LossSum]:
        """Returns all losses by name.

        Raises:
            DataFormatError: the batch lacks a target's labels.
        """
        losses: dict[str, LossSum] = {}
        for name in self.names:
            try:
                losses.update(self._modules[name](hidden, batch, segment_ids))  # type: ignore[misc]
            except KeyError as missing:
                labels = ", ".join(sorted(batch.labels)) or "none"
                raise DataFormatError(
                    f"target {name!r} needs the labels {missing.args[0]!r}, but the batch has: {labels}; "
                    "choose a data_processor that makes them"
                ) from missing
        return losses
