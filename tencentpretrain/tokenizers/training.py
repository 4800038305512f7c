"""Makes vocabularies from a corpus: counted characters or words, WordPiece, byte-level BPE, SentencePiece.

The same corpus and settings give the same bytes, whatever the number of workers or threads.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from tencentpretrain.errors import ConfigError, DataFormatError

Unit = Literal["char", "space"]
Merges = list[tuple[str, str]]


def reserved_tokens() -> list[str]:
    """Returns the 104 entries at the head of every vocabulary: [PAD], [unused1..99], [UNK], [CLS], [SEP], [MASK]."""
    return ["[PAD]", *(f"[unused{number}]" for number in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def sentinel_tokens(count: int) -> list[str]:
    """Returns the sentinels <extra_id_0>, <extra_id_1>, ... in ascending order."""
    return [f"<extra_id_{number}>" for number in range(count)]


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A corpus that can be read again and again: its name for messages, and its lines in chunks."""

    name: str
    chunks: Callable[[], Iterable[list[str]]]

    def lines(self) -> Iterator[str]:
        """Yields the lines one by one."""
        for chunk in self.chunks():
            yield from chunk


def counted_vocabulary(
    corpus: TextSource, unit: Unit, *, min_count: int, lower: bool, workers: int, limit: int | None, sentinels: int = 0
) -> list[str]:
    """Counts characters or blank-separated words: reserved tokens, then by falling count, ties by first appearance."""
    counts: Counter[str] = Counter()
    for part in _in_order(_count, ((chunk, unit, lower) for chunk in corpus.chunks()), workers):
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


def _count(lines: list[str], unit: Unit, lower: bool) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for line in lines:
        words = (line.lower() if lower else line).split()  # white space cannot stand in a file of one token per line
        counts.update("".join(words) if unit == "char" else words)
    return dict(counts)


def _in_order(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """Runs jobs on several processes, keeping two per worker under way, and yields results in the order of jobs."""
    if workers <= 1:
        for job in jobs:
            yield function(*job)
        return
    with ProcessPoolExecutor(workers) as pool:
        waiting: list[Future[Any]] = []
        for job in jobs:
            waiting.append(pool.submit(function, *job))
            if len(waiting) >= 2 * workers:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def train_wordpiece(
    corpus: TextSource, *, vocab_size: int, min_count: int, lower: bool, sentinels: int = 0
) -> list[str]:
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


def _alphabet(corpus: TextSource, *, lower: bool, min_count: int) -> tuple[list[str], list[str]]:
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
    corpus: TextSource, *, vocab_size: int, min_count: int, lower: bool, sentinels: int = 0
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


def train_sentencepiece(corpus: TextSource, *, vocab_size: int, lower: bool, sentinels: int = 0) -> bytes:
    """Trains a SentencePiece unigram model with [PAD] [UNK] [CLS] [SEP] [MASK] as ids 0 to 4, then the sentinels.

    Returns:
        The bytes of the model file. It has fewer pieces than `vocab_size` where the corpus does not give as many.
    """
    import sentencepiece

    model = io.BytesIO()
    texts = filter(None, corpus.lines())
    _refuse_nothing(Counter(next(filter(None, corpus.lines()), "")), corpus)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
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
        reason = re.sub(r"^.*?\) \[.*\] ", "", str(error)).strip() or "it is below the number of reserved pieces"
        raise ConfigError(
            f"vocab_size: SentencePiece cannot train {vocab_size} pieces on {corpus.name}: {reason}"
        ) from None
    return model.getvalue()


def vocabulary_text(tokens: Sequence[str]) -> str:
    """Returns the content of a vocabulary file: one token per line."""
    return "".join(f"{token}\n" for token in tokens)


def merges_text(merges: Merges) -> str:
    """Returns the content of a merges file in the published form, with its first line."""
    return "".join(("#version: 0.2\n", *(f"{left} {right}\n" for left, right in merges)))


def _by_id(vocab: dict[str, int]) -> list[str]:
    return sorted(vocab, key=vocab.__getitem__)


def _refuse_nothing(counts: Counter[str], corpus: TextSource) -> None:
    if not counts:
        raise DataFormatError(f"{corpus.name}: the corpus has blank lines only; there is nothing to count")


def _refuse_small(vocab_size: int, fixed: int, corpus: TextSource) -> None:
    if vocab_size < fixed:
        raise ConfigError(
            f"vocab_size: {vocab_size} is too small; {corpus.name} has {fixed} reserved tokens and characters; "
            "raise --vocab_size, or --min_count to leave out rare characters"
        )
