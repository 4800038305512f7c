"""What a classifier got right: confusion matrix, precision, recall, F1, accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ClassificationReport:
    """Counts of predictions against gold labels.

    Shapes:
        confusion: (labels, labels) int64, [predicted, gold].
    """

    confusion: NDArray[np.int64]

    @classmethod
    def count(cls, predicted: NDArray[np.int64], gold: NDArray[np.int64], num_labels: int) -> ClassificationReport:
        """Counts how often each label was predicted for each gold label; both arguments are (N,)."""
        pairs = np.bincount(predicted * num_labels + gold, minlength=num_labels * num_labels)
        return cls(confusion=pairs.reshape(num_labels, num_labels).astype(np.int64))

    @property
    def correct(self) -> int:
        """Number of rows predicted right."""
        return int(np.trace(self.confusion))

    @property
    def total(self) -> int:
        """Number of rows."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of rows predicted right."""
        return self.correct / self.total if self.total else 0.0

    @property
    def precision(self) -> NDArray[np.float64]:
        """(labels,) share of right ones among the rows predicted so; 0 where none was."""
        return _share(np.diag(self.confusion), self.confusion.sum(axis=1))

    @property
    def recall(self) -> NDArray[np.float64]:
        """(labels,) share of rows of each label that were found; 0 where there are none."""
        return _share(np.diag(self.confusion), self.confusion.sum(axis=0))

    @property
    def f1(self) -> NDArray[np.float64]:
        """(labels,) harmonic mean of precision and recall."""
        return _share(2 * np.diag(self.confusion), self.confusion.sum(axis=0) + self.confusion.sum(axis=1))

    @property
    def macro_f1(self) -> float:
        """Mean of F1 over the labels."""
        return float(self.f1.mean())

    def text(self) -> str:
        """Returns the report in the published form."""
        columns = zip(self.precision, self.recall, self.f1, strict=True)
        return "\n".join(
            [
                "Confusion matrix [predicted, gold]:",
                *(" ".join(str(count) for count in row) for row in self.confusion.tolist()),
                "Report precision, recall, and f1:",
                *(f"Label {label}: {p:.3f}, {r:.3f}, {f:.3f}" for label, (p, r, f) in enumerate(columns)),
                f"Acc. (Correct/Total): {self.accuracy:.4f} ({self.correct}/{self.total}) ",
            ]
        )


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
