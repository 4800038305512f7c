"""A downstream task as a value: which table it reads, its head, its loss, its measure and its prediction file.

The loop is in `finetune.py`, prediction in `predict.py`; a new task is one file that registers a `Task`. Importing a
task costs no torch, so flags and help are known first: heads and arrays are imported where they are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tencentpretrain.config.base import Section
from tencentpretrain.errors import DataFormatError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from tencentpretrain.config.model import ModelConfig
    from tencentpretrain.data.batch import Batch
    from tencentpretrain.targets.base import LossSum
    from tencentpretrain.tasks.config import AdversarialConfig
    from tencentpretrain.tasks.examples import Examples
    from tencentpretrain.tasks.tsv import Table
    from tencentpretrain.tokenizers.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How good predictions are.

    Fields:
        metrics: by name; the task's `best_metric` chooses the epoch.
        text: the published report for people.
    """

    metrics: Mapping[str, float]
    text: str


class Task(ABC):
    """One task with the settings of one run.

    A subclass is built by `for_training` or `for_inference` from the sections of flags it declares.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    training_sections: ClassVar[tuple[type[Section], ...]] = ()
    inference_sections: ClassVar[tuple[type[Section], ...]] = ()
    head_prefixes: ClassVar[tuple[str, ...]] = ()
    """Names of the head's tensors begin so; initial weights need not have them."""
    best_metric: ClassVar[str]
    example: ClassVar[str] = ""
    """A few rows of the table, shown by --help."""

    adversarial: AdversarialConfig | None = None

    @classmethod
    @abstractmethod
    def for_training(cls, sections: Mapping[type[Section], Any], train: Table) -> Task:
        """Builds the task from its flags and the training table (which says how many labels there are)."""

    @classmethod
    @abstractmethod
    def for_inference(cls, sections: Mapping[type[Section], Any]) -> Task:
        """Builds the task from its flags."""

    @classmethod
    @abstractmethod
    def training_columns(cls, sections: Mapping[type[Section], Any]) -> tuple[str, ...]:
        """Returns the columns that a training table must have."""

    labelled_columns: ClassVar[tuple[str, ...]] = ("label", "text_a")
    unlabelled_columns: ClassVar[tuple[str, ...]] = ("text_a",)
    optional_input: ClassVar[tuple[str, ...]] = ("text_b",)
    """Columns of input that a table may have; then all tables of a model must."""

    @classmethod
    def problems(cls, config: ModelConfig, seq_length: int, *, inference: bool = False) -> Iterator[str]:
        """Yields what stands against running the task on this model, each sentence with its key in front."""
        if "pos" in config.embedding and seq_length > config.max_seq_length:
            yield (
                f"seq_length: is {seq_length}, but the model's position table has {config.max_seq_length} rows "
                f"(max_seq_length); give --seq_length {config.max_seq_length} or less"
            )

    @classmethod
    def check_same_input(cls, train_columns: Sequence[str], other: Table) -> None:
        """Refuses a table with other input than the training table's, such as single texts for a model of pairs.

        Raises:
            DataFormatError: a column of texts is there in one of them only.
        """
        for name in cls.optional_input:
            if (name in train_columns) != other.has(name):
                there, here = ("has", "is missing") if name in train_columns else ("has no", "is there")
                raise DataFormatError(
                    f"{other.path}:1: column {name} {here}, but the training table {there} {name}; "
                    "give tables with the same kind of input"
                )

    def body_config(self, config: ModelConfig) -> ModelConfig:
        """Returns the model below the head: no pre-training target and, unless a task overrides this, no decoder."""
        return config.model_copy(update={"target": (), "decoder": None, "share_embedding": False})

    @abstractmethod
    def build_head(self, config: ModelConfig) -> nn.Module:
        """Returns the head: a module called with (hidden, segment_ids) that returns logits."""

    @abstractmethod
    def examples(
        self, table: Table, tokenizer: Tokenizer, seq_length: int, *, labelled: bool, training: bool = False
    ) -> Examples:
        """Tokenises a table.

        Raises:
            DataFormatError: a label is not one; the message has file and line.
        """

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch) -> LossSum:
        """Returns the loss over the rows of a batch."""

    @abstractmethod
    def evaluate(self, logits: NDArray[Any], examples: Examples) -> Evaluation:
        """Measures the logits of all rows, in the order of the table."""

    @abstractmethod
    def prediction_lines(self, logits: NDArray[Any], examples: Examples) -> list[str]:
        """Returns the lines of the prediction file, header first, one per row of the table."""

    def describe(self) -> Mapping[str, object]:
        """Returns what the run folder notes about the task."""
        return {"task": self.name}
