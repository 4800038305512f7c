"""Old data sets: a concatenation of pickled instances, read without running any code."""

from __future__ import annotations

import hashlib
import io
import pickle
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tencentpretrain.data.examples import Ids, PairExample
from tencentpretrain.errors import DataFormatError

_PICKLE_START = b"\x80"


def is_legacy_dataset(path: Path) -> bool:
    """Says whether a file looks like an old `dataset.pt`: pickles of tuples, one after the other."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(2)
    return head[:1] == _PICKLE_START and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")


class _PlainUnpickler(pickle.Unpickler):
    """Reads tuples, lists, numbers and strings; refuses whatever would name a class or a function."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which an instance never does")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an object outside, which an instance never does")


class LegacyDataset:
    """An old `dataset.pt`. The file is scanned once for where each instance begins.

    Raises:
        DataFormatError: the file is cut off, or holds something else than plain instances.
    """

    def __init__(self, path: str | Path, processor: str) -> None:
        self.path = Path(path)
        self.processor = processor
        self._file: BinaryIO | None = None
        offsets: list[int] = []
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, io.SEEK_END)
                file.seek(0)
                while (begin := file.tell()) < size:
                    self._load(file, len(offsets))
                    offsets.append(begin)
        except OSError as error:
            raise DataFormatError(f"{self.path}: the data set cannot be read ({error.strerror})") from None
        if not offsets:
            raise DataFormatError(f"{self.path}: the data set is empty")
        self._offsets: NDArray[np.int64] = np.array(offsets, np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content."""
        checksum = size = 0
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                checksum = zlib.crc32(block, checksum)
                size += len(block)
        return hashlib.sha256(f"{size} {checksum}".encode()).hexdigest()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that the instances were made with, as far as their lengths tell."""
        try:
            return legacy_settings(self.processor, self[0])
        except (TypeError, ValueError, IndexError):
            raise DataFormatError(self._foreign()) from None

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Any:
        if self._file is None:
            self._file = self.path.open("rb")
        self._file.seek(int(self._offsets[index]))
        return self._load(self._file, index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def example(self, index: int, decode: Callable[[Any], Any]) -> Any:
        """Decodes an instance.

        Raises:
            DataFormatError: it does not have the form of this processor's instances.
        """
        try:
            return decode(self[index])
        except (TypeError, ValueError, IndexError):
            raise DataFormatError(f"{self._foreign()} (instance {index})") from None

    def _foreign(self) -> str:
        return (
            f"{self.path}: its instances do not have the form of data_processor {self.processor!r}; "
            "name the one that the data set was made with, or preprocess again"
        )

    def _load(self, file: BinaryIO, index: int) -> Any:
        begin = file.tell()
        try:
            instance = _PlainUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError, AttributeError, KeyError, TypeError) as error:
            raise DataFormatError(
                f"{self.path}: instance {index} at byte {begin} is not an old data set's: {error}; preprocess again"
            ) from None
        if not isinstance(instance, tuple):
            raise DataFormatError(
                f"{self.path}: instance {index} at byte {begin} is a {type(instance).__name__}, not a tuple; "
                "this is not a data set of preprocess.py"
            )
        return instance


def legacy_settings(processor: str, instance: Any) -> dict[str, Any]:
    """Returns seq_length, and tgt_seq_length where there are targets, from the padded lengths of an instance."""
    ids, padding = instance[0]
    length = len(ids) + padding
    settings = {"data_processor": processor, "seq_length": length - (processor in ("lm", "llm_pretrain"))}
    if processor in ("mt", "gsg"):
        target, target_padding = instance[1]
        settings["tgt_seq_length"] = len(target) + target_padding - (processor == "mt")
    return settings


def pad_instance(ids: Ids, length: int) -> tuple[list[int], int]:
    """Returns ids and the number of padding tokens behind them, as old instances hold them."""
    return ids.tolist(), max(length - len(ids), 0)


def unpad_instance(padded: Any) -> Ids:
    """Returns the ids of the pair (ids, number of padding tokens)."""
    ids, padding = padded
    if not isinstance(padding, int):
        raise TypeError("the number of padding tokens is not an integer")
    return np.array(ids, np.int64)


def apply_labels(pairs: Any) -> tuple[Ids, Ids]:
    """Splits pairs (position, original id) into two arrays."""
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def decode_pair(instance: Any) -> PairExample:
    """Reads ((source, padding), (target, padding), [source length])."""
    source, target, _ = instance
    return PairExample(source_ids=unpad_instance(source), target_ids=unpad_instance(target))


def encode_pair(example: PairExample, source_length: int, target_length: int) -> Any:
    """Returns the form that `decode_pair` reads."""
    return (
        pad_instance(example.source_ids, source_length),
        pad_instance(example.target_ids, target_length),
        [len(example.source_ids)],
    )
