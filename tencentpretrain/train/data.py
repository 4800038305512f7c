"""The data of a run: a training set, perhaps a validation set, and the processor that draws samples from both."""

from __future__ import annotations

import itertools
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.data.loader import Loader
from tencentpretrain.data.packing import build_processor
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.samples import Dataset, check_dataset, open_dataset
from tencentpretrain.tokenizers.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Data sets that belong to the processor and its tokenizers."""

    config: DataConfig
    dataset: Dataset
    dev_dataset: Dataset | None
    processor: Processor[Any, Any]

    def loader(self, *, start: int, rank: int, world_size: int) -> Loader:
        """Returns the training batches from a global sample index on."""
        return Loader(
            self.dataset,
            self.processor,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            shuffle=self.config.shuffle,
            start=start,
            rank=rank,
            world_size=world_size,
            num_workers=self.config.num_workers,
        )

    def dev_batches(self, most: int) -> list[Batch]:
        """Returns the first `most` batches of the validation set in file order, always the same."""
        if self.dev_dataset is None:
            return []
        loader = Loader(
            self.dev_dataset,
            self.processor,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            shuffle=False,
            num_workers=0,
        )
        wanted = min(most, max(1, loader.epoch_size // self.config.batch_size))
        with closing(iter(loader)) as batches:  # type: ignore[type-var]
            return list(itertools.islice(batches, wanted))

    @property
    def fingerprints(self) -> dict[str, str]:
        """What identifies the training data, by the name of the setting."""
        return {"dataset_path": self.dataset.fingerprint}


def open_data(
    config: DataConfig, dataset: Dataset, tokenizer: Tokenizer, tgt_tokenizer: Tokenizer | None
) -> TrainingData:
    """Checks that data sets, tokenizers and processor belong together.

    Raises:
        DataFormatError: they do not; the message names both sides.
    """
    processor = build_processor(config, tokenizer, tgt_tokenizer)
    dev = open_dataset(config.dev_dataset_path, config.data_processor) if config.dev_dataset_path else None
    for opened in (dataset, dev):
        if opened is not None:
            check_dataset(opened, processor)
    return TrainingData(config=config, dataset=dataset, dev_dataset=dev, processor=processor)
