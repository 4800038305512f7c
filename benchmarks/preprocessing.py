"""Preprocessing against raw `tokenizers.encode_batch`: tokens per second on the same text, one thread each.

Ours reads the corpus, tokenises it and writes the checksummed store; the raw library only tokenises lines that are
already in memory. Peak memory is measured by benchmarks/preprocess_memory.py.

    python benchmarks/preprocessing.py                                # the corpora of ../shared/data, if they are there
    python benchmarks/preprocessing.py --corpus FILE --vocab VOCAB    # BERT tokens of any text, one document per line
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure

LINES_PER_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class Case:
    """A text and a tokenizer."""

    name: str
    text: str
    flags: tuple[str, ...]
    raw: Callable[[], Any]


def bert_case(name: str, text: str, vocab: Path) -> Case:
    """WordPiece with lower-casing."""

    def raw() -> Any:
        from tokenizers.implementations import BertWordPieceTokenizer

        return BertWordPieceTokenizer(str(vocab), lowercase=True)

    return Case(name=name, text=text, flags=("--tokenizer", "bert", "--vocab_path", str(vocab)), raw=raw)


def bpe_case(name: str, text: str, vocab: Path, merges: Path) -> Case:
    """Byte-level BPE; the vocabulary has one token per line."""

    def raw() -> Any:
        from tokenizers.implementations import ByteLevelBPETokenizer

        ids = {token: index for index, token in enumerate(vocab.read_text(encoding="utf-8").split("\n")) if token}
        pairs = [tuple(line.split(" ")) for line in merges.read_text(encoding="utf-8").split("\n")[1:] if line]
        return ByteLevelBPETokenizer(ids, pairs)

    flags = ("--tokenizer", "bpe", "--vocab_path", str(vocab), "--merges_path", str(merges))
    return Case(name=name, text=text, flags=flags, raw=raw)


def shared_cases(folder: Path) -> list[Case]:
    """Chinese and English corpora, each line a document."""
    names = ("chnsenticorp", "CLUECorpusSmall_sampled", "book_review_cls")
    chinese = "".join((folder / "corpora" / f"{name}.txt").read_text(encoding="utf-8") for name in names)
    english = documentation()
    vocab = folder / "vocab"
    gpt2 = vocab / "huggingface_gpt2_vocab.txt", vocab / "huggingface_gpt2_merges.txt"
    return [
        bert_case("Chinese BERT", chinese, vocab / "google_zh_vocab.txt"),
        bert_case("English BERT", english, vocab / "google_uncased_en_vocab.txt"),
        bpe_case("English GPT-2", english, *gpt2),
    ]


def documentation() -> str:
    """The documentation inside CPython, as `make demo` extracts it."""
    from tencentpretrain.demo.corpus import write_corpus

    with tempfile.TemporaryDirectory() as folder:
        return write_corpus(Path(folder)).lines.read_text(encoding="utf-8")


def grow(text: str, megabytes: float) -> str:
    """Repeats a text that is too short to be timed well."""
    size = len(text.encode("utf-8"))
    return text * max(1, round(megabytes * 1e6 / size))


def run_ours(case: Case, corpus: Path, store: Path) -> int:
    """Builds the store anew and returns its number of tokens."""
    from tencentpretrain.data.store import Store
    from tencentpretrain.entry.preprocess import main

    shutil.rmtree(store, ignore_errors=True)
    arguments = ["--corpus_path", str(corpus), "--dataset_path", str(store), "--data_processor", "lm", *case.flags]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main([*arguments, "--processes_num", "1", "--overwrite"])
    if code:
        raise SystemExit(f"preprocess failed: {output.getvalue()}")
    return Store.open(store).num_tokens


def run_raw(tokenizer: Any, lines: Sequence[str]) -> int:
    """Tokenises all lines and returns the number of tokens."""
    return sum(
        len(encoding.ids)
        for start in range(0, len(lines), LINES_PER_BATCH)
        for encoding in tokenizer.encode_batch(list(lines[start : start + LINES_PER_BATCH]), add_special_tokens=False)
    )


def compare(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Times both in turn."""
    text = grow(case.text, options.megabytes)
    lines = [line for line in text.split("\n") if line.strip()]
    tokenizer = case.raw()
    with tempfile.TemporaryDirectory() as folder:
        corpus, store = Path(folder) / "corpus.txt", Path(folder) / "store"
        corpus.write_text(text, encoding="utf-8")
        our_tokens, raw_tokens = run_ours(case, corpus, store), run_raw(tokenizer, lines)
        ours, raw = measure.alternate(
            options.rounds, lambda: run_ours(case, corpus, store), lambda: run_raw(tokenizer, lines)
        )
    ratios = [(our_tokens / a) / (raw_tokens / b) for a, b in zip(ours, raw, strict=True)]
    return {
        "case": case.name,
        "megabytes": round(len(text.encode("utf-8")) / 1e6, 1),
        "tokens": {"ours": our_tokens, "raw": raw_tokens},
        "tokens_per_second": measure.spread([our_tokens / seconds for seconds in ours], 0),
        "raw_tokens_per_second": measure.spread([raw_tokens / seconds for seconds in raw], 0),
        "ratio": measure.spread(ratios),
    }


def main() -> None:
    """Measures every case and writes the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="UTF-8 text, one document per line")
    parser.add_argument("--vocab", type=Path, help="WordPiece vocabulary for --corpus")
    parser.add_argument(
        "--shared", type=Path, default=measure.ROOT.parent / "shared" / "data", help="folder with corpora"
    )
    parser.add_argument(
        "--megabytes", type=float, default=16, help="repeat texts to about this size (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default %(default)s)")
    parser.add_argument("--memory", action="store_true", help="also run benchmarks/preprocess_memory.py")
    parser.add_argument("--quick", action="store_true", help="2 MB, two rounds; writes no file")
    options = parser.parse_args()
    if options.quick:
        options.megabytes, options.rounds = 2, 2
    measure.pin(1)
    if options.corpus:
        if not options.vocab:
            parser.error("--corpus needs --vocab")
        cases = [bert_case(options.corpus.stem, options.corpus.read_text(encoding="utf-8"), options.vocab)]
    elif options.shared.is_dir():
        cases = shared_cases(options.shared)
    else:
        parser.error(f"{options.shared} does not exist; give --corpus and --vocab")
    began = time.perf_counter()
    figures = [compare(case, options) for case in cases]
    measure.print_table(
        ("text", "MB", "ours tok/s", "raw tok/s", "ratio", "lowest", "highest"),
        [
            [
                figure["case"], figure["megabytes"], figure["tokens_per_second"]["median"],
                figure["raw_tokens_per_second"]["median"], figure["ratio"]["median"], figure["ratio"]["lowest"],
                figure["ratio"]["highest"],
            ]
            for figure in figures
        ],
    )  # fmt: skip
    print(f"{time.perf_counter() - began:.0f} s")
    if not options.quick:
        facts = measure.environment(1, "tokenizers", "numpy")
        measure.write_results("preprocessing", {"environment": facts, "cases": figures})
    if options.memory:
        script = Path(__file__).with_name("preprocess_memory.py")
        raise SystemExit(subprocess.run([sys.executable, str(script)], check=False).returncode)


if __name__ == "__main__":
    main()
