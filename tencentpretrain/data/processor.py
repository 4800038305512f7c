"""What every pre-training format offers: a plan of an epoch's samples, a sample, a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.arrays import BatchArrays
from tencentpretrain.data.records import LAYOUT_OF, Layout, RecordFormat
from tencentpretrain.data.store import IndexArray, Store, TokenizerFacts
from tencentpretrain.errors import ConfigError
from tencentpretrain.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from tencentpretrain.data.batch import Batch

ExampleT = TypeVar("ExampleT")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The samples of one epoch in file order.

    Attributes:
        size: how many there are.
        skipped: how many records give no sample, because they do not fit.
    """

    size: int
    skipped: int = 0

    def __len__(self) -> int:
        return self.size


PlanT = TypeVar("PlanT", bound=Plan)


class Processor(ABC, Generic[PlanT, ExampleT]):
    """A pre-training format.

    A sample is a function of store, seed, version and index alone. Its version is the epoch modulo `dup_factor`, so
    an epoch's samples come back after `dup_factor` epochs; with `dynamic_masking` masks are drawn anew every epoch,
    while the choice of sentences still comes back.

    Attributes:
        record_format: how `preprocess.py` reads a corpus for it.
        accepts: layouts of stores that it can use.
        target_names: the targets that its labels serve.
        varies: whether the plan has random choices.
        uses_tgt_tokenizer: whether targets have a tokenizer of their own.
    """

    record_format: ClassVar[RecordFormat]
    accepts: ClassVar[tuple[Layout, ...]]
    target_names: ClassVar[frozenset[str]]
    varies: ClassVar[bool] = False
    uses_tgt_tokenizer: ClassVar[bool] = False

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, tgt_tokenizer: Tokenizer | None = None) -> None:
        self.data = data
        self.tokenizer_facts = TokenizerFacts.of(tokenizer)
        self.tgt_tokenizer_facts = TokenizerFacts.of(tgt_tokenizer or tokenizer)
        self.pad_id = tokenizer.pad_id
        self.cls_id = tokenizer.cls_id
        self.sep_id = tokenizer.sep_id
        tgt = tgt_tokenizer or tokenizer
        self.tgt_pad_id, self.tgt_cls_id, self.tgt_sep_id = tgt.pad_id, tgt.cls_id, tgt.sep_id

    @property
    def layout(self) -> Layout:
        """The layout of the stores that `preprocess.py` makes for it."""
        return LAYOUT_OF[self.record_format]

    @classmethod
    def corpus_format(cls, *, json_lines: bool) -> RecordFormat:
        """Returns how a corpus is read: `json_lines` is the flag `--json_format_corpus`."""
        return "json_lines" if json_lines and cls.record_format == "lines" else cls.record_format

    @abstractmethod
    def plan(self, store: Store, epoch: int) -> PlanT:
        """Returns the samples of an epoch; equal for epochs of equal `plan_version`."""

    @abstractmethod
    def sample(self, store: Store, plan: PlanT, index: int, rng: np.random.Generator) -> ExampleT:
        """Makes sample `index` of a plan, drawing from `rng`."""

    @abstractmethod
    def arrays(self, examples: Sequence[ExampleT]) -> BatchArrays:
        """Pads samples to a batch."""

    @property
    def row_width(self) -> int:
        """The positions of one row of a batch."""
        return self.data.seq_length

    def positions(self, store: Store, plan: PlanT) -> IndexArray:
        """Returns how many positions of a row each sample of a plan takes, (size,); what `pack_documents` needs."""
        raise ConfigError(
            f"pack_documents: is not possible with processor {self.data.data_processor!r}; leave it out, "
            "or use lm, llm_pretrain, llm_sft or mlm"
        )

    def collate(self, examples: Sequence[ExampleT]) -> Batch:
        """Pads samples to a batch of tensors."""
        return self.arrays(examples).to_batch()

    def plan_version(self, epoch: int) -> int:
        """Which of the different plans an epoch has."""
        return epoch % self.data.dup_factor if self.varies else 0

    @property
    def num_plans(self) -> int:
        """The number of different plans; epoch e has plan e modulo this."""
        return self.data.dup_factor if self.varies else 1

    def draw_version(self, epoch: int) -> int:
        """Which of the different random versions of its samples an epoch has."""
        return epoch if self.data.dynamic_masking else epoch % self.data.dup_factor

    @abstractmethod
    def decode_instance(self, instance: Any, rng: np.random.Generator) -> ExampleT:
        """Makes a sample from an instance of an old `dataset.pt`.

        Raises:
            ValueError, TypeError, IndexError: it is not an instance of this format.
        """

    @abstractmethod
    def encode_instance(self, example: ExampleT) -> Any:
        """Returns a sample in the form of an old `dataset.pt`, for comparisons."""
