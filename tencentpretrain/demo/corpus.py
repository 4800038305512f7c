"""Real text that every machine has: the documentation inside CPython.

Docstrings are read from the standard library's source (nothing is imported or run); the language reference comes from
`pydoc_data.topics`. A docstring's label is the package that it documents.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
)
DEV_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Documented:
    """One docstring: the package it belongs to, and its paragraphs in reading order."""

    package: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DemoCorpus:
    """The files written by `write_corpus` and what they hold."""

    documents: Path
    lines: Path
    train: Path
    dev: Path
    labels: tuple[str, ...]
    num_docstrings: int
    num_bytes: int


def docstrings(library: Path) -> Iterator[Documented]:
    """Yields every docstring below a library folder, in a fixed order."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if SKIPPED_FOLDERS & set(parts):
            continue
        package = parts[0].removesuffix(".py")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # a few files are broken on purpose, for tests of the parser
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield Documented(package=package, paragraphs=_paragraphs(text))


def reference_topics() -> Iterator[Documented]:
    """Yields the pages of the language reference that `help()` shows."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Documented(package="(language reference)", paragraphs=_paragraphs(topics[name]))


def write_corpus(folder: Path, *, num_classes: int = 16, library: Path | None = None) -> DemoCorpus:
    """Writes the demo's files: documents of sentences, one paragraph per line, and a classification set.

    Held-out docstrings stand in the dev file only: pre-training never reads them.

    Args:
        folder: where the files go.
        num_classes: how many of the best-documented packages become classes.
        library: the standard library; this interpreter's own if not given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = list(dict.fromkeys(docstrings(library or Path(sysconfig.get_paths()["stdlib"]))))
    sizes = Counter(text.package for text in found for paragraph in text.paragraphs if _is_prose(paragraph))
    labels = tuple(sorted(package for package, _ in sizes.most_common(num_classes)))

    files = {name: folder / name for name in ("documents.txt", "lines.txt", "train.tsv", "dev.tsv")}
    rows: dict[str, list[str]] = {"train.tsv": ["label\ttext_a"], "dev.tsv": ["label\ttext_a"]}
    documents: list[str] = []
    lines: list[str] = []
    seen: set[str] = set()
    for text in [*found, *reference_topics()]:
        held_out = text.package in labels and _is_held_out(text)
        prose = [paragraph for paragraph in text.paragraphs if _is_prose(paragraph)]
        if not held_out:
            sentences = [sentence for paragraph in text.paragraphs for sentence in _sentences(paragraph)]
            documents.append("\n".join(sentences) + "\n")
            lines.extend(text.paragraphs)
        if text.package in labels:
            split = "dev.tsv" if held_out else "train.tsv"
            fresh = [paragraph for paragraph in prose if paragraph not in seen]
            seen.update(fresh)
            rows[split].extend(f"{labels.index(text.package)}\t{paragraph}" for paragraph in fresh)
    contents = {"documents.txt": "\n".join(documents), "lines.txt": "\n".join(lines) + "\n"}
    contents |= {name: "\n".join(split) + "\n" for name, split in rows.items()}
    for name, content in contents.items():
        files[name].write_text(content, encoding="utf-8")
    return DemoCorpus(
        documents=files["documents.txt"],
        lines=files["lines.txt"],
        train=files["train.tsv"],
        dev=files["dev.tsv"],
        labels=labels,
        num_docstrings=len(found),
        num_bytes=len(contents["lines.txt"].encode()),
    )


def _paragraphs(text: str) -> tuple[str, ...]:
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return tuple(block for block in blocks if block)


def _sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?:;])\s+(?=\S)", paragraph)


def _is_prose(paragraph: str) -> bool:
    """Long enough to be told apart, and no code listing, signature or table."""
    words = paragraph.split()
    return len(words) >= 8 and ">>>" not in paragraph and sum(word.isalpha() for word in words) >= len(words) / 2


def _is_held_out(text: Documented) -> bool:
    digest = hashlib.sha256("\n".join(text.paragraphs).encode()).digest()
    return digest[0] < DEV_SHARE * 256
