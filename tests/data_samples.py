"""A small vocabulary, corpora and stores for the tests of data."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tencentpretrain.config.data import CorpusConfig, DataConfig
from tencentpretrain.data.build import build_store
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.store import Store
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer
from tencentpretrain.tokenizers.base import Tokenizer

WORDS = [f"w{number}" for number in range(60)]
SENTINELS = 12


def tokenizer_of(folder: Path) -> Callable[[], Tokenizer]:
    """Returns what makes a tokenizer of words: PAD 0, UNK 1, CLS 2, SEP 3, MASK 4, words from 5, then sentinels."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.txt"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"<extra_id_{n}>" for n in range(SENTINELS))]
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return functools.partial(build_tokenizer, TokenizerConfig(tokenizer="space", vocab_path=str(path)))


def sentence(rng: random.Random, shortest: int = 2, longest: int = 12) -> str:
    """Returns some words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(shortest, longest)))


def corpus_text(kind: str, size: int = 40, seed: int = 1) -> str:
    """Returns a corpus in the format that a processor's `record_format` names."""
    rng = random.Random(seed)
    if kind == "sentences":
        documents = ["\n".join(sentence(rng) for _ in range(rng.randint(1, 8))) for _ in range(size)]
        return "\n\n".join(documents) + "\n"
    make = {
        "lines": lambda: sentence(rng, 1, 60),
        "json_lines": lambda: f'{{"text": "{sentence(rng, 1, 60)}"}}',
        "tsv_pairs": lambda: f"{sentence(rng)}\t{sentence(rng)}",
        "instructions": lambda: f'{{"instruction": "{sentence(rng)}", "output": "{sentence(rng)}"}}',
        "labelled": lambda: (
            f"{rng.randint(0, 2)}\t{sentence(rng)}" + (f"\t{sentence(rng)}" if rng.random() < 0.5 else "")
        ),
    }[kind]
    return "\n".join(make() for _ in range(size)) + "\n"


def make_store(folder: Path, name: str, text: str | bytes | None = None, **corpus: Any) -> Store:
    """Preprocesses a text for a processor."""
    kind = PROCESSORS.get(name)
    tokenizer = tokenizer_of(folder)
    path = folder / f"{name}.txt"
    content = text if text is not None else corpus_text(kind.record_format)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = CorpusConfig.model_validate({"corpus_path": str(path), "shard_bytes": 700, "max_rejected": 1.0, **corpus})
    return build_store(
        config, folder / f"{name}.store", processor=name, record_format=kind.record_format, tokenizer=tokenizer
    ).store


def make_processor(folder: Path, name: str, **settings: Any) -> Processor[Any, Any]:
    """Returns a processor with short sequences."""
    given = {"data_processor": name, "seq_length": 24, "tgt_seq_length": 16, "dup_factor": 2, **settings}
    return PROCESSORS.get(name)(DataConfig.model_validate(given), tokenizer_of(folder)())


def digest(folder: Path) -> str:
    """Returns a hash over the names and contents of a folder's files."""
    parts = [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
    return hashlib.sha256(
        repr([(name, hashlib.sha256(content).digest()) for name, content in parts]).encode()
    ).hexdigest()


class SlowTokenizer:
    """Makes a tokenizer that leaves time to kill its process."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __call__(self) -> Tokenizer:
        tokenizer: Tokenizer = self.make()
        encode = tokenizer.encode_packed

        def slowly(texts: Any) -> Any:
            time.sleep(0.05)
            return encode(texts)

        tokenizer.encode_packed = slowly  # type: ignore[method-assign]
        return tokenizer


class FailingTokenizer(SlowTokenizer):
    """Makes a tokenizer that cannot stand one word."""

    def __call__(self) -> Any:
        tokenizer = self.make()
        encode = tokenizer.encode_packed

        def strictly(texts: Any) -> Any:
            if any("w59 w59" in text for text in texts):
                raise KeyError("w59 w59")
            return encode(texts)

        tokenizer.encode_packed = strictly
        return tokenizer


class DyingTokenizer(SlowTokenizer):
    """Makes a tokenizer that kills its process at one word, the first time that any process meets it."""

    def __init__(self, make: Any, word: str, mark: Path) -> None:
        super().__init__(make)
        self.word, self.mark = word, mark

    def __call__(self) -> Any:
        tokenizer = self.make()
        encode = tokenizer.encode_packed

        def mortally(texts: Any) -> Any:
            if any(self.word in text for text in texts) and not self.mark.exists():
                self.mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(texts)

        tokenizer.encode_packed = mortally
        return tokenizer


class WaitingTokenizer(SlowTokenizer):
    """Makes a tokenizer that waits until the victim, one Ray node, is at work; on the victim it never ends."""

    def __init__(self, make: Any, victim: str, mark: Path) -> None:
        super().__init__(make)
        self.victim, self.mark = victim, mark

    def __call__(self) -> Any:
        tokenizer = self.make()
        encode = tokenizer.encode_packed

        def patiently(texts: Any) -> Any:
            import ray

            here = ray.get_runtime_context().get_node_id() == self.victim
            if here:
                self.mark.touch()
            deadline = time.monotonic() + 120
            while (here or not self.mark.exists()) and time.monotonic() < deadline:
                time.sleep(0.05)
            return encode(texts)

        tokenizer.encode_packed = patiently
        return tokenizer
