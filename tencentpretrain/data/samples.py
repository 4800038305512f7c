"""Maps a global sample index to a sample, and refuses data that do not belong to the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from tencentpretrain.data.arrays import BatchArrays
from tencentpretrain.data.legacy import LegacyDataset, is_legacy_dataset
from tencentpretrain.data.processor import Plan, Processor
from tencentpretrain.data.random import ORDER, SAMPLE, KeyedGenerator
from tencentpretrain.data.store import Store
from tencentpretrain.errors import DataFormatError

Dataset = Union[Store, LegacyDataset]


def open_dataset(path: str | Path, processor: str) -> Dataset:
    """Opens what `preprocess.py` has written: a store, or an old `dataset.pt` of a processor.

    Raises:
        DataFormatError: there is no data set, or it is damaged.
    """
    path = Path(path)
    return LegacyDataset(path, processor) if is_legacy_dataset(path) else Store.open(path)


def check_dataset(dataset: Dataset, processor: Processor[Any, Any]) -> None:
    """Compares a data set with the processor and tokenizers of a run.

    Raises:
        DataFormatError: they do not belong together; the message has both sides and the command that mends it.
    """
    if isinstance(dataset, LegacyDataset):
        if processor.data.pack_documents:
            raise DataFormatError(
                f"{dataset.path}: an old data set does not say where documents begin and end, so pack_documents cannot "
                "keep them apart; preprocess the corpus again, or leave --pack_documents out"
            )
        return
    header, path = dataset.header, dataset.path
    again = f"python preprocess.py --corpus_path {header.inputs.get('corpus')} --dataset_path <new name>"
    name = processor.data.data_processor
    if header.layout not in processor.accepts:
        raise DataFormatError(
            f"{path}: holds records of the layout {header.layout!r} (made for data_processor {header.processor!r}), "
            f"but data_processor {name!r} needs {' or '.join(map(repr, processor.accepts))}; name another processor, "
            f"or preprocess again: {again} --data_processor {name}"
        )
    if header.tokenizer.fingerprint != processor.tokenizer_facts.fingerprint:
        raise DataFormatError(
            f"{path}: was made with the tokenizer {header.tokenizer}, but this run has {processor.tokenizer_facts}; "
            f"give the tokenizer of the data set (--vocab_path .../{header.tokenizer.source}), or preprocess again "
            f"with this run's: {again} --data_processor {name} --vocab_path .../{processor.tokenizer_facts.source}"
        )
    theirs = header.tgt_tokenizer or header.tokenizer
    ours = processor.tgt_tokenizer_facts if processor.uses_tgt_tokenizer else processor.tokenizer_facts
    if header.layout == "pairs" and theirs.fingerprint != ours.fingerprint:
        raise DataFormatError(
            f"{path}: its targets were made with the tokenizer {theirs}, but this run has {ours} for targets; give the "
            f"tokenizer of the data set (--tgt_vocab_path .../{theirs.source}), or preprocess again: {again} "
            f"--data_processor {name}"
        )


class SampleStream:
    """The samples of all epochs one after the other, each epoch in its own order."""

    def __init__(self, dataset: Dataset, processor: Processor[Any, Any], *, seed: int, shuffle: bool) -> None:
        self.dataset = dataset
        self.processor = processor
        self._shuffle = shuffle
        self._order_rng = KeyedGenerator(seed, ORDER, int(dataset.fingerprint[:12], 16))
        self._sample_rng = KeyedGenerator(seed, SAMPLE)
        self._sizes: list[int] = []
        self._plan: tuple[int, Plan] = (-1, Plan(size=0))
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what a worker can plan for itself."""
        return {**self.__dict__, "_plan": (-1, Plan(size=0)), "_order": (-1, np.zeros(0, np.int64))}

    def epoch_sizes(self) -> list[int]:
        """Returns the number of samples of all different plans; after them the sizes repeat.

        Raises:
            DataFormatError: there is not a single sample.
        """
        if not self._sizes:
            num_plans = 1 if isinstance(self.dataset, LegacyDataset) else self.processor.num_plans
            self._sizes = [len(self._plan_of(version)) for version in range(num_plans)]
            if not all(self._sizes):
                skipped = self._plan[1].skipped
                hint = f": all {skipped:,} records are too long for seq_length" if skipped else ""
                raise DataFormatError(f"{self.dataset.path}: the data set gives not a single sample{hint}")
        return self._sizes

    @property
    def skipped(self) -> int:
        """The number of records that give no sample because they are too long."""
        self.epoch_sizes()
        return self._plan[1].skipped

    def locate(self, index: int) -> tuple[int, int]:
        """Returns epoch and place in it of a global sample index."""
        sizes = self.epoch_sizes()
        rounds, rest = divmod(index, sum(sizes))
        epoch = rounds * len(sizes)
        while rest >= sizes[epoch % len(sizes)]:
            rest -= sizes[epoch % len(sizes)]
            epoch += 1
        return epoch, rest

    def __getitem__(self, index: int) -> Any:
        epoch, place = self.locate(index)
        plan = self._plan_of(epoch % len(self._sizes))
        row = int(self._order_of(epoch, len(plan))[place]) if self._shuffle else place
        if isinstance(self.dataset, LegacyDataset):
            rng = self._sample_rng.at(epoch, row)
            return self.dataset.example(row, lambda instance: self.processor.decode_instance(instance, rng))
        rng = self._sample_rng.at(self.processor.draw_version(epoch), row)
        return self.processor.sample(self.dataset, plan, row, rng)

    def batch(self, start: int, batch_size: int, rank: int, world_size: int) -> BatchArrays:
        """Returns a rank's part of the global batch that begins at a global sample index."""
        indices = range(start + rank, start + batch_size * world_size, world_size)
        arrays = self.processor.arrays([self[index] for index in indices])
        if isinstance(self.dataset, LegacyDataset):
            self._check_ids(arrays)
        return arrays

    def _check_ids(self, arrays: BatchArrays) -> None:
        """Finds ids outside the vocabulary, against which an old data set has no header."""
        size = self.processor.tokenizer_facts.vocab_size
        if (largest := int(arrays.token_ids.max())) >= size:
            raise DataFormatError(
                f"{self.dataset.path}: holds the token id {largest}, but the vocabulary "
                f"{self.processor.tokenizer_facts} ends at {size - 1}; give the vocabulary of the data set"
            )

    def _plan_of(self, version: int) -> Plan:
        if self._plan[0] != version:
            if isinstance(self.dataset, LegacyDataset):
                self._plan = (version, Plan(size=len(self.dataset)))
            else:
                self._plan = (version, self.processor.plan(self.dataset, version))
        return self._plan[1]

    def _order_of(self, epoch: int, size: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            self._order = (epoch, self._order_rng.at(epoch, 0).permutation(size))
        return self._order[1]
