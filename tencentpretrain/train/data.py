"""The data of a run: stores that fit the tokenizer and the processor, as streams of batches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.data.loader import Loader
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.store import Store, TokenizerFacts
from tencentpretrain.errors import DataFormatError
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.tokenizers.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A training store, perhaps a validation store, and the processor that draws samples from both."""

    config: DataConfig
    store: Store
    dev_store: Store | None
    processor: Processor[Any, Any]

    def loader(self, *, start: int, rank: int, world_size: int) -> Loader:
        """Returns the training batches from a global sample index on."""
        return Loader(
            self.store,
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
        """Returns the first `most` batches of the validation store in file order, always the same."""
        if self.dev_store is None:
            return []
        loader = Loader(
            self.dev_store,
            self.processor,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            shuffle=False,
            num_workers=0,
        )
        samples = len(self.processor.plan(self.dev_store, 0))
        wanted = min(most, max(1, samples // self.config.batch_size))
        return list(itertools.islice(loader, wanted))

    def fingerprints(self) -> dict[str, str]:
        """Returns what identifies the data, by the name of the setting."""
        return {"dataset_path": self.store.fingerprint}


def open_data(config: DataConfig, store: Store, tokenizer: Tokenizer, tgt_tokenizer: Tokenizer | None) -> TrainingData:
    """Checks that stores, tokenizers and processor belong together.

    Raises:
        DataFormatError: they do not; the message names both sides.
    """
    processor = PROCESSORS.get(config.data_processor)(config, tokenizer, tgt_tokenizer)
    dev_store = Store.open(config.dev_dataset_path) if config.dev_dataset_path else None
    for opened in (store, *([dev_store] if dev_store else [])):
        if opened.header.layout not in processor.accepts:
            raise DataFormatError(
                f"{opened.path}: holds records of layout {opened.header.layout!r} (made for "
                f"{opened.header.processor!r}), but data_processor {config.data_processor!r} reads "
                f"{' or '.join(processor.accepts)}; preprocess the corpus for it"
            )
        _check_tokenizer(opened, "", opened.header.tokenizer, tokenizer)
        if tgt_tokenizer is not None and opened.header.tgt_tokenizer is not None:
            _check_tokenizer(opened, "tgt_", opened.header.tgt_tokenizer, tgt_tokenizer)
    return TrainingData(config=config, store=store, dev_store=dev_store, processor=processor)


def _check_tokenizer(store: Store, side: str, stored: TokenizerFacts, tokenizer: Tokenizer) -> None:
    given = TokenizerFacts.of(tokenizer)
    if given.fingerprint != stored.fingerprint:
        raise DataFormatError(
            f"{store.path}: was made with {stored}, but {side}tokenizer and {side}vocab_path of this run give {given}; "
            "use the same vocabulary, or preprocess the corpus again"
        )
