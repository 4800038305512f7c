"""Makes vocabularies from a corpus: counted characters or words, WordPiece, byte-level BPE, SentencePiece.

The same corpus and settings give the same bytes, whatever the number of workers or threads.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal

from tencentpretrain.errors import ConfigError, DataFormatError
from tencentpretrain.sniff import describe_file

Unit = Literal["char", "space"]
Merges = list[tuple[str, str]]

_BLOCK_BYTES = 1 << 24


def reserved_tokens() -> list[str]:
    """Returns the 104 entries at the head of every vocabulary: [PAD], [unused1..99], [UNK], [CLS], [SEP], [MASK]."""
    return ["[PAD]", *(f"[unused{number}]" for number in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def sentinel_tokens(count: int) -> list[str]:
    """Returns the sentinels <extra_id_0>, <extra_id_1>, ... in ascending order."""
    return [f"<extra_id_{number}>" for number in range(count)]


class Corpus:
    """A text file, plain or .gz or .zst, read line by line as often as needed.

    Raises:
        ConfigError: there is no such file.
        DataFormatError: the file is empty or recognisably no text; while reading: a line is not UTF-8.
    """

    def __init__(self, path: str) -> None:
        if not Path(path).exists():
            raise ConfigError(f"corpus_path: {path} does not exist")
        what = describe_file(path)
        self.path = path
        self.compressed = what in ("a gzip archive", "a zstandard archive")
        if what is not None and not self.compressed:
            raise DataFormatError(f"{path}: --corpus_path wants UTF-8 text, plain or .gz or .zst, but this is {what}")

    def lines(self) -> Iterator[str]:
        """Yields the lines without their ends."""
        with self.open() as file:
            yield from _decoded(file, self.path, first_line=1)

    def open(self) -> IO[bytes]:
        """Opens the text's bytes."""
        file = Path(self.path).open("rb")
        if not self.compressed:
            return file
        if file.peek(2)[:2] == b"\x1f\x8b":
            return gzip.open(file)
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file))

    def blocks(self, block_bytes: int = _BLOCK_BYTES) -> Iterator[tuple[bytes, int]]:
        """Yields the bytes in blocks of whole lines, each with the number of its first line."""
        line = 1
        with self.open() as file:
            while block := file.read(block_bytes):
                block += file.readline()
                yield block, line
                line += block.count(b"\n")


def _decoded(lines: Iterable[bytes], path: str, first_line: int) -> Iterator[str]:
    for number, line in enumerate(lines, start=first_line):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataFormatError(
                f"{path}:{number}: byte 0x{line[error.start]:02x} is not UTF-8; convert the corpus to UTF-8 first"
            ) from None


def counted_vocabulary(
    corpus: Corpus, unit: Unit, *, min_count: int, lower: bool, workers: int, limit: int | None, sentinels: int = 0
) -> list[str]:
    """Counts characters or blank-separated words: reserved tokens, then by falling count, ties by first appearance."""
    counts: Counter[str] = Counter()
    for part in _in_order(_count_block, ((block, line, corpus.path, unit, lower) for block, line in corpus.blocks()), workers):
        for token, count in part.items():
            counts[token] += count
    head, tail = reserved_tokens(), sentinel_tokens(sentinels)
    for token in (*head, *tail):
        counts.pop(token, None)
    _refuse_nothing(counts, corpus)
    ranked = sorted(counts.items(), key=lambda item: -item[1])  # stable, so ties keep the order of first appearance
    kept = [token for token, count in ranked if count >= min_count]
    if limit is not None:
        kept = kept[: max(0, limit - len(head) - len(tail))]
    return [*head, *kept, *tail]


def _count_block(block: bytes, first_line: int, path: str, unit: Unit, lower: bool) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for line in _decoded(io.BytesIO(block), path, first_line):
        if lower:
            line = line.lower()
        words = line.split()  # white space cannot stand in a vocabulary of one token per line
        counts.update("".join(words) if unit == "char" else words)
    return dict(counts)


def _in_order(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """Runs jobs on several processes, keeping two per worker under way, and yields results in the order of jobs."""
    if workers <= 1:
        for job in jobs:
            yield function(*job)
        return
    with ProcessPoolExecutor(workers) as pool:
        waiting = []
        for job in jobs:
            waiting.append(pool.submit(function, *job))
            if len(waiting) >= 2 * workers:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def train_wordpiece(corpus: Corpus, *, vocab_size: int, min_count: int, lower: bool, sentinels: int = 0) -> list[str]:
    """Trains a WordPiece vocabulary: reserved tokens, characters, their `##` forms, then pieces as they are learnt."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordPiece
    from tokenizers.trainers import WordPieceTrainer

    trainee = Tokenizer(WordPiece(unk_token="[UNK]"))
    trainee.normalizer = normalizers.BertNormalizer(lowercase=lower)
    trainee.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    first, inner = _alphabet(corpus, lower=lower, min_count=min_count)
    head, tail = reserved_tokens(), sentinel_tokens(sentinels)
    fixed = [*head, *first, *(f"##{char}" for char in inner)]
    _refuse_small(vocab_size, len(fixed) + len(tail), corpus)
    # The trainer numbers `##` forms in the order of a randomly seeded hash map, and breaks ties by number; named here,
    # they have fixed numbers.
    trainer = WordPieceTrainer(
        vocab_size=vocab_size - len(tail),
        min_frequency=min_count,
        special_tokens=fixed,
        limit_alphabet=len(first) + len(inner),
        show_progress=False,
    )
    trainee.train_from_iterator(corpus.lines(), trainer)
    # Rare characters that only the trainer saw are left out.
    learnt = _by_id(trainee.get_vocab())[len(fixed) :]
    kept = [token for token in learnt if len(token.removeprefix("##")) > 1]
    return [*fixed, *kept, *tail]


def _alphabet(corpus: Corpus, *, lower: bool, min_count: int) -> tuple[list[str], list[str]]:
    """Finds the characters that begin words and those inside words, each by code point."""
    from tencentpretrain.tokenizers.basic import basic_words

    words: Counter[str] = Counter()
    for line in corpus.lines():
        words.update(line.split())
    first: Counter[str] = Counter()
    inner: Counter[str] = Counter()
    for text, count in words.items():
        for word in basic_words(text, lower=lower):
            first[word[0]] += count
            for char in word[1:]:
                inner[char] += count
    _refuse_nothing(first, corpus)
    total = first + inner
    kept = {char for char, count in total.items() if count >= min_count}
    return sorted(kept), sorted(kept & set(inner))


def train_bpe(
    corpus: Corpus, *, vocab_size: int, min_count: int, lower: bool, sentinels: int = 0
) -> tuple[list[str], Merges]:
    """Trains a byte-level BPE: reserved tokens, the 256 bytes, then the result of each merge.

    Returns:
        The tokens in the order of ids, and the merges, first learnt first.
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    head, tail = reserved_tokens(), sentinel_tokens(sentinels)
    _refuse_small(vocab_size, len(head) + 256 + len(tail), corpus)
    trainee = Tokenizer(BPE())
    if lower:
        trainee.normalizer = normalizers.Lowercase()
    trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(tail),
        min_frequency=min_count,
        special_tokens=head,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trainee.train_from_iterator(corpus.lines(), trainer)
    merges = [(left, right) for left, right in json.loads(trainee.to_str())["model"]["merges"]]
    return [*_by_id(trainee.get_vocab()), *tail], merges


def train_sentencepiece(corpus: Corpus, *, vocab_size: int, lower: bool, sentinels: int = 0) -> bytes:
    """Trains a SentencePiece unigram model with [PAD] [UNK] [CLS] [SEP] [MASK] as ids 0 to 4, then the sentinels.

    Returns:
        The bytes of the model file. It has fewer pieces than `vocab_size` where the corpus does not give as many.
    """
    import sentencepiece

    model = io.BytesIO()
    longest = 0

    def texts() -> Iterator[str]:
        nonlocal longest
        for line in corpus.lines():
            if text := line.strip().replace("\x00", " "):
                longest = max(longest, len(text))
                yield text

    _refuse_nothing(Counter(next(texts(), "")), corpus)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts(),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="unigram",
            character_coverage=0.9999,
            normalization_rule_name="nmt_nfkc_cf" if lower else "nmt_nfkc",
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            control_symbols=["[MASK]", *sentinel_tokens(sentinels)],
            max_sentence_length=1 << 24,  # the default leaves out lines above 4,192 bytes
            num_threads=16,  # sums of the EM step are split by thread, so the number is fixed
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = re.sub(r"^.*\) \[.*?\] ", "", str(error)).strip() or "the corpus is too small"
        raise ConfigError(f"{corpus.path}: SentencePiece cannot train with --vocab_size {vocab_size}: {reason}") from None
    return model.getvalue()


def write_vocabulary(path: str, tokens: Sequence[str]) -> None:
    """Writes one token per line, all or nothing."""
    write_bytes(path, "".join(f"{token}\n" for token in tokens).encode("utf-8"))


def write_merges(path: str, merges: Merges) -> None:
    """Writes merges in the published form, with its first line."""
    write_bytes(path, "".join(("#version: 0.2\n", *(f"{left} {right}\n" for left, right in merges))).encode("utf-8"))


def write_bytes(path: str, content: bytes) -> None:
    """Writes a file under another name and renames it, so that no half file is ever seen."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _by_id(vocab: dict[str, int]) -> list[str]:
    return sorted(vocab, key=vocab.__getitem__)


def _refuse_nothing(counts: Counter[str], corpus: Corpus) -> None:
    if not counts:
        raise DataFormatError(f"{corpus.path}: the corpus has blank lines only; there is nothing to count")


def _refuse_small(vocab_size: int, fixed: int, corpus: Corpus) -> None:
    if vocab_size < fixed:
        raise ConfigError(
            f"vocab_size: {vocab_size} is too small; reserved tokens and characters of {corpus.path} alone are {fixed}; "
            "raise --vocab_size, or --min_count to leave out rare characters"
        )
