"""What every tokenizer offers: text to ids in bulk, ids to text, special tokens, a fingerprint."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tencentpretrain.errors import ConfigError
from tencentpretrain.tokenizers.config import TokenizerConfig
from tencentpretrain.tokenizers.special_tokens import SpecialTokens
from tencentpretrain.tokenizers.vocabulary import digest

TokenIds: TypeAlias = NDArray[np.uint32]
Offsets: TypeAlias = NDArray[np.int64]

CHUNK_CHARS = 1 << 17
"""Texts are encoded in groups of about this many characters, so that the arrays stay in the processor's cache."""

_RESERVED = re.compile(r"\[unused\d+\]|<unused\d+>|madeupword\d+|<extra_id_\d+>|<\|[^|]*\|>|<0x[0-9A-F]{2}>|")


class Tokenizer(ABC):
    """Text <-> token ids over one vocabulary.

    No method adds special tokens. Special tokens inside raw text are ordinary characters, except where a kind says so.
    """

    def __init__(
        self, tokens: Sequence[str], special: SpecialTokens, *, source: str, identity: Iterable[str | bytes]
    ) -> None:
        """Args:

        tokens: the vocabulary in the order of ids.
        special: the special tokens in it.
        source: the vocabulary's file, for messages.
        identity: everything besides vocabulary and special tokens that changes the ids (flags, merges, a model).
        """
        self.tokens: tuple[str, ...] = tuple(tokens)
        self.vocab: Mapping[str, int] = {token: index for index, token in enumerate(self.tokens)}
        self.inv_vocab: Mapping[int, str] = dict(enumerate(self.tokens))
        self.special = special
        self.source = source
        self.fingerprint = digest(type(self).__name__, "\n".join(self.tokens), repr(special), *identity)
        self._word_flags: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None

    @classmethod
    @abstractmethod
    def from_config(cls, config: TokenizerConfig) -> Tokenizer:
        """Opens the files that the configuration names.

        Raises:
            ConfigError: a file or a special token is missing.
            DataFormatError: a file is not what it should be.
        """

    @abstractmethod
    def tokenize(self, text: str) -> list[str]:
        """Cuts a text into tokens."""

    @abstractmethod
    def _encode_chunk(self, texts: Sequence[str]) -> tuple[TokenIds, Offsets]:
        """Encodes a few texts; same form as `encode_packed`."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Joins tokens to a text. What tokenising lost (case, runs of blanks) stays lost."""

    def encode_packed(self, texts: Sequence[str]) -> tuple[TokenIds, Offsets]:
        """Encodes many texts without an object per token: the path for preprocessing.

        Returns:
            ids: (total,) uint32, the ids of all texts one after the other.
            offsets: (len(texts) + 1,) int64; text i is ids[offsets[i]:offsets[i + 1]].
        """
        parts = [self._encode_chunk(chunk) for chunk in _chunks(texts)]
        if len(parts) == 1:
            return parts[0]
        ends: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        total = 0
        for part_ids, part_offsets in parts:
            ends.append(part_offsets[1:] + total)
            total += len(part_ids)
        ids = np.concatenate([part_ids for part_ids, _ in parts]) if parts else np.zeros(0, np.uint32)
        return ids, np.concatenate(ends)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the tokens of one text."""
        result: list[int] = self._encode_chunk([text])[0].tolist()
        return result

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """Returns one array of ids per text."""
        ids, offsets = self.encode_packed(texts)
        return np.split(ids, offsets[1:-1]) if len(texts) else []

    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]:
        """Looks tokens up; one that is not in the vocabulary becomes the unknown token."""
        unk_id = self.unk_id
        return [self.vocab.get(token, unk_id) for token in tokens]

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Looks ids up.

        Raises:
            IndexError: an id lies outside the vocabulary.
        """
        return [self.tokens[_inside(int(index), len(self.tokens))] for index in ids]

    @property
    def vocab_size(self) -> int:
        """Number of ids, which is the number of rows of the embedding."""
        return len(self.tokens)

    @property
    def pad_id(self) -> int:
        """Id of padding."""
        return self.special.pad_id

    @property
    def unk_id(self) -> int:
        """Id of the unknown token."""
        return self.special.unk_id

    @property
    def cls_id(self) -> int:
        """Id of the token that begins a sequence."""
        return self.special.cls_id

    @property
    def sep_id(self) -> int:
        """Id of the token that separates and ends sequences."""
        return self.special.sep_id

    @property
    def mask_id(self) -> int:
        """Id of the mask.

        Raises:
            ConfigError: the vocabulary has none.
        """
        if self.special.mask_id is None:
            raise ConfigError(
                f"{self.source}: there is no mask token {self.special.names.mask or ''!r} in the vocabulary, but the "
                "objective needs one; choose another --data_processor or name the mask in --special_tokens_map"
            )
        return self.special.mask_id

    @property
    def sentinel_id(self) -> int | None:
        """Id of the first sentinel; the others follow upwards. None where the vocabulary has none."""
        return self.special.sentinel_id

    @property
    def num_sentinels(self) -> int:
        """Number of consecutive sentinel ids from `sentinel_id`."""
        return self.special.num_sentinels

    def ordinary_ids(self) -> TokenIds:
        """Returns the ids that a random replacement may draw: neither special nor reserved nor a sentinel."""
        special = set(self.special.ids())
        first = self.special.sentinel_id
        if first is not None:
            special.update(range(first, first + self.special.num_sentinels))
        kept = [
            index
            for index, token in enumerate(self.tokens)
            if index not in special and not _RESERVED.fullmatch(token) and not self._is_reserved(index)
        ]
        return np.asarray(kept, np.uint32)

    def _is_reserved(self, index: int) -> bool:
        """Says whether an id is reserved by something else than its spelling."""
        return False

    def word_starts(self, ids: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Marks the ids that begin a word, for masking whole words.

        A word never runs across a special token or a CJK character, each of which is a word of its own.

        Shapes:
            ids: (length,)
            returns: (length,)
        """
        if self._word_flags is None:
            self._word_flags = self._find_word_flags()
        begins, closes = self._word_flags
        starts: NDArray[np.bool_] = begins[ids]
        if len(starts):
            starts[1:] |= closes[ids[:-1]]
            starts[0] = True
        return starts

    def _find_word_flags(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        special = set(self.special.ids())
        begins = np.ones(self.vocab_size, bool)
        closes = np.zeros(self.vocab_size, bool)
        for index, token in enumerate(self.tokens):
            if index in special or _RESERVED.fullmatch(token):
                closes[index] = True
                continue
            surface, starts_word = self._surface(token)
            begins[index] = starts_word or is_cjk(surface[:1])
            closes[index] = is_cjk(surface[-1:])
        return begins, closes

    def _surface(self, token: str) -> tuple[str, bool]:
        """Returns the text of a token without its word mark, and whether the token begins a word by itself."""
        return token, True


CJK_RANGES = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def is_cjk(char: str) -> bool:
    """Says whether a character is a CJK ideograph, as BERT's basic tokenizer means it (eight Unicode ranges)."""
    if not char or char < "\u3400":
        return False
    point = ord(char)
    return any(low <= point <= high for low, high in CJK_RANGES)


def replace_surrogates(text: str, replacement: str = "\ufffd") -> str:
    """Replaces half surrogate pairs, which JSON escapes can bring in and no encoder accepts."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", replacement, text)


def pack(lists: Sequence[Sequence[int]]) -> tuple[TokenIds, Offsets]:
    """Joins lists of ids to the form of `Tokenizer.encode_packed`."""
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, lists), np.int64, len(lists)), out=offsets[1:])
    ids = np.fromiter(chain.from_iterable(lists), np.uint32, int(offsets[-1]))
    return ids, offsets


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    begin = chars = 0
    for index, text in enumerate(texts):
        chars += len(text)
        if chars >= CHUNK_CHARS:
            yield texts[begin : index + 1]
            begin, chars = index + 1, 0
    if begin < len(texts):
        yield texts[begin:]


def _inside(index: int, size: int) -> int:
    if not 0 <= index < size:
        raise IndexError(f"token id {index} is outside the vocabulary of {size}")
    return index
