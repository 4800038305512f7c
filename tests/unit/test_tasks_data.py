"""Tables, tokenised examples, reports and adversarial gradients, each alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from torch import nn

from tencentpretrain.errors import DataFormatError
from tencentpretrain.methods.adversarial import AdversarialMethod, FastGradient, ProjectedGradient
from tencentpretrain.tasks.classification import read_labels, read_logits, softmax
from tencentpretrain.tasks.examples import batches_by_length, bucketed_batches, encode_texts, shuffled_batches
from tencentpretrain.tasks.metrics import ClassificationReport
from tencentpretrain.tasks.tsv import read_table


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_marks(tmp_path: Path, ending: str, last: bool, mark: bytes) -> None:
    content = f'text_a\tlabel{ending}"a\u2028b" \t1{ending}c\u0085\t0' + (ending if last else "")
    table = read_table(write(tmp_path / "t.tsv", mark + content.encode()), required=("label", "text_a"))
    assert table.column("label") == ["1", "0"]
    assert table.column("text_a") == ['"a\u2028b" ', "c\u0085"]
    assert table.where(1).endswith("t.tsv:3")


def test_blank_lines(tmp_path: Path) -> None:
    assert len(read_table(write(tmp_path / "a", "label\ttext_a\n1\tx\n\n\n"), required=())) == 1
    assert read_table(write(tmp_path / "b", "text_a\nx\n\ny\n\n"), required=()).column("text_a") == ["x", "", "y", ""]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("label\ttext_a\n1\tx\n0\ty\tz\n1\n", r"(?s)2 of 3 rows.*:3: 3 fields.*:4: 1 fields"),
        ("lable\ttext_a\n1\tx\n", r":1: column label is missing.*did you mean 'lable'"),
        ("1\tgood book\n0\tbad\n", "first row must hold the column names"),
        ("label,text_a\n1,x\n", "not commas"),
        ("label\ttext_a\ttext_a\n1\tx\ty\n", "stands twice"),
        ("label\ttext_a\n", "no rows"),
        ("", "empty"),
        (b"label\ttext_a\n1\tx\n1\t\xff\xfe\n", r":3: not UTF-8"),
        ("标签\t文本\n1\t好看的书\n".encode("gb18030"), r":1: not UTF-8 text; .*GB18030"),
        ("<!DOCTYPE html><html></html>", "HTML page"),
    ],
)
def test_wrong_tables_are_named(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(DataFormatError, match=said):
        read_table(write(tmp_path / "t.tsv", content), required=("label", "text_a"))


def test_missing_table(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="cannot be read"):
        read_table(tmp_path / "none.tsv", required=())


def test_labels_and_logits(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "t", "label\tlogits\n1\t0.5 -1\n0\t1e-3 2\n"), required=())
    assert read_labels(table, num_labels=2) == [1, 0]
    assert read_logits(table, 2) == [[0.5, -1.0], [0.001, 2.0]]
    with pytest.raises(DataFormatError, match=r"t:2: label 1 is out of range"):
        read_labels(table, num_labels=1)
    with pytest.raises(DataFormatError, match=r"t:2: logits must be 3 finite numbers"):
        read_logits(table, 3)
    named = read_table(write(tmp_path / "n", "label\tx\nneg\t0\npos\tnan\n"), required=())
    with pytest.raises(DataFormatError, match=r"n:2: label 'neg'.*\{'neg': 0, 'pos': 1\}"):
        read_labels(named, num_labels=None)


class Letters:
    """A tokenizer of letters: a is 10, b is 11 ..."""

    cls_id, sep_id, pad_id = 1, 2, 0

    def encode_packed(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([10 + ord(letter) - ord("a") for text in texts for letter in text], np.uint32)
        return ids, np.cumsum([0, *map(len, texts)])


def test_examples_and_batches() -> None:
    labels = {"cls": np.array([3, 4, 5])}
    examples = encode_texts(["ab", "", "abcdef"], ["c", "d", "efg"], Letters(), 9, labels)  # type: ignore[arg-type]
    batch = examples.batch(np.array([2, 0]), pad_id=0)
    assert batch.token_ids.tolist() == [[1, 10, 11, 12, 13, 14, 15, 2, 14], [1, 10, 11, 2, 12, 2, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 1, 1, 1, 2], [1, 1, 1, 1, 2, 2, 0, 0, 0]]
    assert batch.labels["cls"].tolist() == [5, 3]
    assert batch.token_count == 15
    assert batch.has_padding
    assert examples.batch(np.array([0]), pad_id=0).has_padding is False
    assert examples.batch(np.array([1]), pad_id=7, width=6).token_ids.tolist() == [[1, 2, 13, 2, 7, 7]]
    cut = encode_texts(["abcdef"], ["efg"], Letters(), 4)  # type: ignore[arg-type]
    assert cut.batch(np.array([0]), pad_id=0).segment_ids.tolist() == [[1, 1, 1, 1]]


def test_orders() -> None:
    first = [rows.tolist() for rows in shuffled_batches(10, 4, seed=7, epoch=1)]
    assert [len(rows) for rows in first] == [4, 4, 2]
    assert sorted(row for rows in first for row in rows) == list(range(10))
    assert first == [rows.tolist() for rows in shuffled_batches(10, 4, seed=7, epoch=1)]
    assert first != [rows.tolist() for rows in shuffled_batches(10, 4, seed=7, epoch=2)]
    assert first != [rows.tolist() for rows in shuffled_batches(10, 4, seed=8, epoch=1)]
    assert [rows.tolist() for rows in batches_by_length(np.array([1, 5, 3]), 2)] == [[1, 2], [0]]


@pytest.mark.parametrize("num_rows", [0, 1, 31, 32, 33, 2000, 4011])
def test_buckets(num_rows: int) -> None:
    """Every row once, the short batch last, like lengths together, another order each epoch."""
    lengths = np.random.default_rng(0).integers(5, 129, num_rows)
    first = list(bucketed_batches(lengths, 32, seed=7, epoch=1))
    assert sorted(row for rows in first for row in rows.tolist()) == list(range(num_rows))
    assert [len(rows) for rows in first[:-1]] == [32] * (len(first) - 1)
    assert len(first) == -(-num_rows // 32)
    again = list(bucketed_batches(lengths, 32, seed=7, epoch=1))
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    if num_rows > 1000:
        other = [rows.tolist() for rows in bucketed_batches(lengths, 32, seed=7, epoch=2)]
        assert {frozenset(rows.tolist()) for rows in first}.isdisjoint(map(frozenset, other))
        longest = [int(lengths[rows].max()) for rows in first]
        assert longest != sorted(longest, reverse=True)
        padded = sum(len(rows) * int(lengths[rows].max()) for rows in first)
        shuffled = shuffled_batches(num_rows, 32, seed=7, epoch=1)
        assert padded < 1.05 * lengths.sum() < 1.5 * lengths.sum() < sum(32 * int(lengths[r].max()) for r in shuffled)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_report_equals_scikit_learn() -> None:
    draw = np.random.default_rng(1)
    gold, predicted = draw.integers(0, 4, 200), draw.integers(0, 3, 200)  # label 3 is never predicted
    report = ClassificationReport.count(predicted, gold, 5)
    assert (report.confusion == confusion_matrix(predicted, gold, labels=range(5))).all()
    expected = precision_recall_fscore_support(gold, predicted, labels=range(5), zero_division=0)
    for found, wanted in zip((report.precision, report.recall, report.f1), expected, strict=False):
        assert np.allclose(found, wanted)
    assert report.accuracy == pytest.approx(accuracy_score(gold, predicted))


def test_report_text() -> None:
    report = ClassificationReport.count(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]), 2)
    assert report.text() == (
        "Confusion matrix [predicted, gold]:\n2 0\n1 1\nReport precision, recall, and f1:\n"
        "Label 0: 1.000, 0.667, 0.800\nLabel 1: 0.500, 1.000, 0.667\nAcc. (Correct/Total): 0.7500 (3/4) "
    )


def test_softmax_survives_large_logits() -> None:
    assert np.allclose(softmax(np.array([[1000.0, 1000.0], [-1e30, 0.0]])), [[0.5, 0.5], [0.0, 1.0]])


class Quadratic(nn.Module):
    """f = sum(e^3) + sum(h^2): its gradient at a moved embedding is known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.head = nn.Parameter(torch.tensor([2.0]))

    def loss(self) -> torch.Tensor:
        return self.embedding.pow(3).sum() + self.head.square().sum() * self.embedding.sum()


def gradients(method: AdversarialMethod) -> tuple[torch.Tensor, torch.Tensor, Quadratic]:
    model = Quadratic()
    model.loss().backward()
    method.add_gradients(model, lambda: model.loss().backward())
    assert model.embedding.grad is not None
    assert model.head.grad is not None
    return model.embedding.grad, model.head.grad, model


def grad_of(embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return 3 * embedding.square() + 4, 4 * embedding.sum().reshape(1)


def test_fast_gradient_adds_the_gradient_at_the_moved_weights() -> None:
    start = torch.tensor([3.0, 4.0])
    here = grad_of(start)
    there = grad_of(start + 0.5 * here[0] / here[0].norm())
    embedding, head, model = gradients(FastGradient(epsilon=0.5))
    assert torch.allclose(embedding, here[0] + there[0])
    assert torch.allclose(head, here[1] + there[1])
    assert torch.equal(model.embedding, start)


@pytest.mark.parametrize("radius", [10.0, 0.4])
def test_projected_gradient_steps_within_the_ball(radius: float) -> None:
    start = torch.tensor([3.0, 4.0])
    here = grad_of(start)
    moved, gradient = start.clone(), here
    for _ in range(3):
        moved = moved + 0.3 * gradient[0] / gradient[0].norm()
        shift = moved - start
        if shift.norm() > radius:
            moved = start + shift * radius / shift.norm()
        gradient = grad_of(moved)
    embedding, head, model = gradients(ProjectedGradient(steps=3, epsilon=radius, alpha=0.3))
    assert torch.allclose(embedding, here[0] + gradient[0])
    assert torch.allclose(head, here[1] + gradient[1])
    assert torch.equal(model.embedding, start)
