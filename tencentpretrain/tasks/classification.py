"""Classification of texts and pairs of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tencentpretrain.config.base import Section
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.errors import DataFormatError
from tencentpretrain.registry import TASKS
from tencentpretrain.tasks.base import Evaluation, Task
from tencentpretrain.tasks.config import AdversarialConfig, OutputConfig, SoftTargetConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from tencentpretrain.data.batch import Batch
    from tencentpretrain.targets.base import LossSum
    from tencentpretrain.tasks.examples import Examples
    from tencentpretrain.tasks.tsv import Table
    from tencentpretrain.tokenizers.base import Tokenizer

_SHOWN = 8


@TASKS.register("classifier")
class TextClassification(Task):
    """Assigns one of n labels, 0 to n - 1, to a text or to a pair of texts."""

    name = "classifier"
    description = "classification of texts (text_a) or pairs of texts (text_a, text_b)"
    training_sections = (SoftTargetConfig, AdversarialConfig)
    inference_sections = (OutputConfig,)
    head_prefixes = ("output_layer_",)
    best_metric = "accuracy"
    example = "label<TAB>text_a<TAB>text_b\n1<TAB>how old are you<TAB>your age?"

    def __init__(
        self,
        *,
        num_labels: int,
        soft: SoftTargetConfig | None = None,
        adversarial: AdversarialConfig | None = None,
        output_logits: bool = False,
        output_prob: bool = False,
    ) -> None:
        self.num_labels = num_labels
        self.soft = soft if soft is not None and soft.soft_targets else None
        self.adversarial = adversarial if adversarial is not None and adversarial.use_adv else None
        self.output_logits = output_logits
        self.output_prob = output_prob

    @classmethod
    def problems(cls, config: ModelConfig, seq_length: int, *, inference: bool = False) -> Iterator[str]:
        """Yields what stands against running the task on this model."""
        yield from super().problems(config, seq_length, inference=inference)
        if config.streams is not None:
            yield "encoder: a two-stream (dual) model has two outputs; the classifier needs a model with one"
        if inference and config.num_labels is None:
            yield "labels_num: is required: the number of labels of the fine-tuned model"

    @classmethod
    def training_columns(cls, sections: Mapping[type[Section], Any]) -> tuple[str, ...]:
        """Returns the columns that a training table must have."""
        return ("label", "text_a", "logits") if sections[SoftTargetConfig].soft_targets else ("label", "text_a")

    @classmethod
    def for_training(cls, sections: Mapping[type[Section], Any], train: Table) -> TextClassification:
        """Counts the labels of the training table."""
        labels = read_labels(train, num_labels=None)
        distinct = sorted(set(labels))
        num_labels = max(sections[ModelConfig].num_labels or 0, len(distinct))
        if num_labels < 2:
            raise DataFormatError(f"{train.path}: all rows have label {distinct[0]}; a classifier needs two or more")
        if distinct[-1] >= num_labels:
            missing = next(label for label in range(distinct[-1] + 1) if label not in distinct)
            raise DataFormatError(
                f"{train.path}: {len(distinct)} labels occur, so they must be 0 to {len(distinct) - 1}, but {missing} "
                f"never occurs (found {_few(distinct)}); renumber them or give --labels_num {distinct[-1] + 1}"
            )
        return cls(num_labels=num_labels, soft=sections[SoftTargetConfig], adversarial=sections[AdversarialConfig])

    @classmethod
    def for_inference(cls, sections: Mapping[type[Section], Any]) -> TextClassification:
        """Takes the number of labels from the flags."""
        num_labels = sections[ModelConfig].num_labels
        assert num_labels is not None
        output: OutputConfig = sections[OutputConfig]
        return cls(num_labels=num_labels, output_logits=output.output_logits, output_prob=output.output_prob)

    def build_head(self, config: ModelConfig) -> nn.Module:
        """Returns tanh(linear) -> linear over the pooled hidden states."""
        from tencentpretrain.tasks.heads import ClassificationHead

        return ClassificationHead(config, self.num_labels)

    def examples(
        self, table: Table, tokenizer: Tokenizer, seq_length: int, *, labelled: bool, training: bool = False
    ) -> Examples:
        """Tokenises texts; with soft targets the training rows carry the other model's logits too."""
        import numpy as np

        from tencentpretrain.tasks.examples import encode_texts

        labels: dict[str, NDArray[Any]] = {}
        if labelled:
            labels["cls"] = np.array(read_labels(table, num_labels=self.num_labels), np.int64)
        if training and self.soft is not None:
            labels["soft"] = np.array(read_logits(table, self.num_labels), np.float32)
        second = table.column("text_b") if table.has("text_b") else None
        return encode_texts(table.column("text_a"), second, tokenizer, seq_length, labels)

    def loss(self, logits: Tensor, batch: Batch) -> LossSum:
        """Negative log-likelihood; with soft targets alpha * MSE(logits, given) + (1 - alpha) * NLL."""
        import torch.nn.functional as F

        from tencentpretrain.targets.base import LossSum

        labels, logits = batch.labels["cls"], logits.float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        if self.soft is not None and "soft" in batch.labels:
            distance = (logits - batch.labels["soft"]).square().mean(dim=-1)
            losses = self.soft.soft_alpha * distance + (1 - self.soft.soft_alpha) * losses
        return LossSum(
            total=losses.sum(), count=labels.new_tensor(len(labels)), correct=(logits.argmax(dim=-1) == labels).sum()
        )

    def evaluate(self, logits: NDArray[Any], examples: Examples) -> Evaluation:
        """Counts right labels."""
        from tencentpretrain.tasks.metrics import ClassificationReport

        report = ClassificationReport.count(logits.argmax(axis=1), examples.labels["cls"], self.num_labels)
        return Evaluation(metrics={"accuracy": report.accuracy, "macro_f1": report.macro_f1}, text=report.text())

    def prediction_lines(self, logits: NDArray[Any], examples: Examples) -> list[str]:
        """Returns `label[<TAB>logits][<TAB>prob]`, numbers separated by spaces."""
        columns = [["label", *map(str, logits.argmax(axis=1).tolist())]]
        if self.output_logits:
            columns.append(["logits", *(_numbers(row) for row in logits)])
        if self.output_prob:
            columns.append(["prob", *(_numbers(row) for row in softmax(logits))])
        return ["\t".join(fields) for fields in zip(*columns, strict=True)]

    def describe(self) -> Mapping[str, object]:
        """Returns what the run folder notes about the task."""
        return {"task": self.name, "labels_num": self.num_labels, "labels": list(range(self.num_labels))}


def read_labels(table: Table, *, num_labels: int | None) -> list[int]:
    """Reads the column `label`.

    Raises:
        DataFormatError: a label is no number or lies outside 0 to num_labels - 1.
    """
    texts = table.column("label")
    labels: list[int] = []
    for row, text in enumerate(texts):
        if not text.strip().isdecimal():
            found = sorted(set(texts))
            mapping = ", ".join(f"{name!r}: {index}" for index, name in enumerate(found[:_SHOWN]))
            hint = f"replace names by numbers, such as {{{mapping}{', ...' if len(found) > _SHOWN else ''}}}"
            raise DataFormatError(f"{table.where(row)}: label {text!r} is not a number from 0 up; {hint}")
        label = int(text)
        if num_labels is not None and label >= num_labels:
            raise DataFormatError(
                f"{table.where(row)}: label {label} is out of range; "
                f"the training table has labels 0 to {num_labels - 1}"
            )
        labels.append(label)
    return labels


def read_logits(table: Table, num_labels: int) -> list[list[float]]:
    """Reads the column `logits`: one number per label, separated by spaces.

    Raises:
        DataFormatError: a row has another count, or something that is not a finite number.
    """
    import math

    result: list[list[float]] = []
    for row, text in enumerate(table.column("logits")):
        try:
            numbers = [float(number) for number in text.split()]
        except ValueError as error:
            raise DataFormatError(f"{table.where(row)}: logits hold something that is not a number ({error})") from None
        if len(numbers) != num_labels or not all(map(math.isfinite, numbers)):
            raise DataFormatError(
                f"{table.where(row)}: logits must be {num_labels} finite numbers, one per label, but are {text[:60]!r}"
            )
        result.append(numbers)
    return result


def softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Returns probabilities over the last axis."""
    import numpy as np

    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float32] = (shifted / shifted.sum(axis=-1, keepdims=True)).astype(np.float32)
    return result


def _numbers(row: NDArray[Any]) -> str:
    import numpy as np

    return " ".join(str(number) for number in row.astype(np.float32))


def _few(labels: list[int]) -> str:
    return ", ".join(map(str, labels[:_SHOWN])) + (" ..." if len(labels) > _SHOWN else "")
