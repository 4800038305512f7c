"""Makes a vocabulary from a corpus: counted characters or words, WordPiece, byte-level BPE or SentencePiece."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tencentpretrain.errors import ConfigError, TencentPretrainError

if TYPE_CHECKING:
    from tencentpretrain.data.corpus import Chunk
    from tencentpretrain.tokenizers.training import TextSource

_TYPES = ("char", "space", "wordpiece", "bpe", "sentencepiece")
_TRAINED_SIZE = 30000


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the flags, writes the vocabulary and prints what was written."""
    options = _parser().parse_args(argv)
    try:
        for line in _build(options):
            print(line)
    except TencentPretrainError as error:
        print(f"build_vocab: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"build_vocab: {error.filename}: {error.strerror}", file=sys.stderr)
        return 5
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="build_vocab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  build_vocab.py --corpus_path corpus.txt --delimiter char --output_path vocab.txt --min_count 5\n"
            "  build_vocab.py --corpus_path corpus.txt --type wordpiece --vocab_size 8000 --lower_case "
            "--output_path vocab.txt\n"
            "  build_vocab.py --corpus_path corpus.txt.zst --type bpe --vocab_size 16000 --output_path vocab.txt "
            "--merges_path merges.txt"
        ),
    )
    parser.add_argument("--corpus_path", required=True, help="text, one line after the other, plain or .gz or .zst")
    parser.add_argument("--output_path", required=True, help="vocabulary to write (sentencepiece: the model)")
    parser.add_argument(
        "--delimiter", choices=("char", "space"), default="char", help="what to count (default %(default)s)"
    )
    parser.add_argument(
        "--type", choices=_TYPES, default=None, help="kind of vocabulary (default: what --delimiter says)"
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=None,
        help=f"entries (default: all that are counted; trained kinds {_TRAINED_SIZE})",
    )
    parser.add_argument("--min_count", type=int, default=1, help="leave out what is rarer (default %(default)s)")
    parser.add_argument(
        "--lower_case", action=argparse.BooleanOptionalAction, default=False, help="lower-case the corpus (default no)"
    )
    parser.add_argument(
        "--workers_num", type=int, default=1, help="processes that count; the result does not depend on it (default 1)"
    )
    parser.add_argument("--merges_path", default=None, help="bpe: merges to write (default: beside the vocabulary)")
    parser.add_argument("--sentinels_num", type=int, default=0, help="add <extra_id_0> ... for T5 (default 0)")
    return parser


def _build(options: argparse.Namespace) -> list[str]:
    kind: str = options.type or options.delimiter
    _refuse_contradictions(options, kind)

    from tencentpretrain.data.durable import storage_errors, write_durably
    from tencentpretrain.tokenizers import training

    faults: dict[int, str] = {}
    corpus = _text_source(options.corpus_path, faults)
    size = options.vocab_size or _TRAINED_SIZE
    shared = {"lower": options.lower_case, "sentinels": options.sentinels_num}
    output = Path(options.output_path)
    files: dict[Path, bytes] = {}
    if kind == "sentencepiece":
        files[output] = training.train_sentencepiece(corpus, vocab_size=size, **shared)
        report = [f"{output}: SentencePiece model; use it as --spm_model_path"]
    else:
        report = []
        if kind == "wordpiece":
            tokens = training.train_wordpiece(corpus, vocab_size=size, min_count=options.min_count, **shared)
        elif kind == "bpe":
            tokens, merges = training.train_bpe(corpus, vocab_size=size, min_count=options.min_count, **shared)
            merges_path = Path(options.merges_path or output.with_name(f"{output.stem}_merges.txt"))
            files[merges_path] = training.merges_text(merges).encode()
            report.append(f"{merges_path}: {len(merges)} merges; use them as --merges_path")
        else:
            tokens = training.counted_vocabulary(
                corpus,
                "char" if kind == "char" else "space",
                min_count=options.min_count,
                workers=options.workers_num,
                limit=options.vocab_size,
                **shared,
            )
        files[output] = training.vocabulary_text(tokens).encode()
        report.insert(0, f"{output}: {len(tokens)} tokens; use it as --vocab_path")
    for path, content in files.items():
        with storage_errors(path, len(content)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, content)
    if faults:
        where, why = min(faults.items())
        report.append(f"{options.corpus_path}: {len(faults)} lines were left out; the first, at byte {where}: {why}")
    return report


def _text_source(path: str, faults: dict[int, str]) -> TextSource:
    """Opens a corpus as chunks of lines; lines that are not usable go to `faults`, by their offset in bytes."""
    from tencentpretrain.data.corpus import CHUNK_BYTES, cut_stream, decode_chunk, open_corpus, read_chunks
    from tencentpretrain.tokenizers.training import TextSource

    corpus = open_corpus(path)

    def decoded() -> Iterator[Chunk]:
        if corpus.compression is None:
            with corpus.path.open("rb") as file:
                yield from read_chunks(file, 0, corpus.size)
            return
        offset = 0
        for stream in cut_stream(corpus, CHUNK_BYTES, documents=False):
            raw = b"".join(stream)
            yield decode_chunk(raw, offset)
            offset += len(raw)

    def chunks() -> Iterator[list[str]]:
        for chunk in decoded():
            faults.update({chunk.offset_of(index): why for index, why in chunk.faults.items()})
            yield [line for line in chunk.lines if line]

    return TextSource(name=path, chunks=chunks)


def _refuse_contradictions(options: argparse.Namespace, kind: str) -> None:
    problems: list[str] = []
    if options.merges_path and kind != "bpe":
        problems.append(f"merges_path: has no effect with --type {kind}; leave it out")
    if kind == "sentencepiece" and options.min_count != 1:
        problems.append("min_count: has no effect with --type sentencepiece; leave it out")
    for name, least in (("min_count", 1), ("workers_num", 1), ("sentinels_num", 0), ("vocab_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            problems.append(f"{name}: must be at least {least}, but is {value}")
    if problems:
        raise ConfigError(problems)
