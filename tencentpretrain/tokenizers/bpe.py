"""Byte-level byte-pair encoding (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners", 2.2)."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import pre_tokenizers
from tokenizers.models import BPE

from tencentpretrain.errors import DataFormatError
from tencentpretrain.registry import TOKENIZERS
from tencentpretrain.tokenizers.base import Offsets, TokenIds, Tokenizer, pack, replace_surrogates
from tencentpretrain.tokenizers.config import TokenizerConfig
from tencentpretrain.tokenizers.lookup import CharTable, WordCache, code_points, pieces, text_bounds
from tencentpretrain.tokenizers.special_tokens import SpecialTokens, find_special_tokens
from tencentpretrain.tokenizers.vocabulary import digest, read_text_file, read_vocabulary

# Classes of characters in the splitting pattern.
_SPACE, _LETTER, _NUMBER, _OTHER = 0, 1, 2, 3
_BLANK, _APOSTROPHE = 0x20, 0x27
_GROUP = 512
_CONTRACTIONS = tuple(tuple(map(ord, ending)) for ending in ("s", "t", "m", "d", "re", "ve", "ll"))


@TOKENIZERS.register("bpe")
class BpeTokenizer(Tokenizer):
    """GPT-2's tokenizer: a splitting pattern, bytes as printable characters, merges.

    The pattern, `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+`, is evaluated on
    arrays of character classes; the parts go through the Rust merges once and come from a cache after that.
    """

    def __init__(
        self, tokens: Sequence[str], merges: Sequence[tuple[str, str]], special: SpecialTokens, *, source: str
    ) -> None:
        super().__init__(tokens, special, source=source, identity=[digest(*(" ".join(merge) for merge in merges))])
        # The Rust model drops bytes that are not in the vocabulary unless it has an unknown token.
        model = BPE(dict(self.vocab), list(merges), unk_token=special.names.unk, fuse_unk=False)
        self._rust = RustTokenizer(model)
        self._rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._num_bytes = np.fromiter(map(len, self.tokens), np.int64, self.vocab_size)
        if not vocabulary_has_all_bytes(self.vocab):
            self._num_bytes[special.unk_id] = 1  # it stands for one byte that has no token
        self._classes = CharTable(_char_class)
        self._words = WordCache(self._encode_words)

    @classmethod
    def from_config(cls, config: TokenizerConfig) -> BpeTokenizer:
        """Opens vocabulary and merges."""
        path = config.vocab_path or ""
        tokens = read_vocabulary(path)
        vocab = {token: index for index, token in enumerate(tokens)}
        merges = read_merges(config.merges_path or "", vocab, vocab_path=path)
        special = find_special_tokens(vocab, source=path, map_path=config.special_tokens_map)
        return cls(tokens, merges, special, source=path)

    def tokenize(self, text: str) -> list[str]:
        """Cuts a text into tokens, spelt in the printable characters that stand for bytes."""
        return self.convert_ids_to_tokens(self.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Restores the text exactly; bytes that form no character become the replacement character."""
        return byte_level_text("".join(self.convert_ids_to_tokens(ids)))

    def split(self, texts: Sequence[str]) -> tuple[list[str], Offsets]:
        """Cuts texts by the splitting pattern.

        Returns:
            The parts of all texts, and the offsets of each text's parts in them; (len(texts) + 1,).
        """
        text = "".join(texts)
        bounds = text_bounds(texts, gap=0)
        if not text:
            return [], np.zeros(len(bounds), np.int64)
        begins = _split_points(code_points(text), self._classes, bounds)
        starts = np.flatnonzero(begins)
        parts = pieces(text, starts, np.append(starts[1:], len(text)))
        return parts, np.searchsorted(starts, bounds).astype(np.int64)

    def _encode_chunk(self, texts: Sequence[str]) -> tuple[TokenIds, Offsets]:
        parts, part_offsets = self.split(texts)
        ids, lengths = self._words.lookup(parts)
        before = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=before[1:])
        return ids, before[part_offsets]

    def _encode_words(self, words: list[str]) -> tuple[TokenIds, Offsets]:
        # One result object for many words is cheaper than one each; where a word ends follows from its bytes.
        clean = [replace_surrogates(word) for word in words]
        groups = [clean[begin : begin + _GROUP] for begin in range(0, len(clean), _GROUP)]
        encodings = self._rust.encode_batch_fast(groups, is_pretokenized=True, add_special_tokens=False)
        ids, _ = pack([encoding.ids for encoding in encodings])
        token_ends = np.cumsum(self._num_bytes[ids])
        word_ends = np.cumsum(np.fromiter((len(word.encode()) for word in clean), np.int64, len(clean)))
        offsets = np.zeros(len(words) + 1, np.int64)
        offsets[1:] = np.searchsorted(token_ends, word_ends) + 1
        return ids, offsets

    def _surface(self, token: str) -> tuple[str, bool]:
        text = byte_level_text(token)
        return text.lstrip(), text[:1].isspace()


def _char_class(char: str) -> int:
    if char.isspace() and not "\x1c" <= char <= "\x1f":  # blanks to Python, not to the pattern
        return _SPACE
    category = unicodedata.category(char)
    return _LETTER if category[0] == "L" else _NUMBER if category[0] == "N" else _OTHER


def _split_points(points: NDArray[np.uint32], table: CharTable, bounds: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Marks the characters at which a part begins. `bounds` are the begins of the texts and the end of the last."""
    size = len(points)
    classes = table[points]
    first = np.zeros(size + 1, bool)
    first[bounds] = True
    begins = np.empty(size, bool)
    begins[0] = True
    np.not_equal(classes[1:], classes[:-1], out=begins[1:])
    begins |= first[:-1]

    # The last blank before a word belongs to the word; another white-space character before it stands alone.
    after = np.flatnonzero((classes[1:] != _SPACE) & (classes[:-1] == _SPACE) & ~first[1:-1]) + 1
    begins[after - 1] = True
    begins[after[points[after - 1] == _BLANK]] = False

    # Contractions, where an apostrophe begins a part.
    quotes = np.flatnonzero((points == _APOSTROPHE) & begins)
    if len(quotes):
        padded = np.append(points, np.zeros(2, np.uint32))
        ends = np.append(first, True)
        for ending in _CONTRACTIONS:
            matches = padded[quotes + 1] == ending[0]
            matches &= ~ends[quotes + 1]
            if len(ending) == 2:
                matches &= (padded[quotes + 2] == ending[1]) & ~ends[quotes + 2]
            found = quotes[matches]
            begins[found + 1] = False
            next_part = found + 1 + len(ending)
            begins[next_part[next_part < size]] = True
    return begins


def read_merges(path: str, vocab: dict[str, int], *, vocab_path: str) -> list[tuple[str, str]]:
    """Reads merges: two tokens per line, most frequent first, after an optional `#version` line.

    Raises:
        ConfigError: there is no such file.
        DataFormatError: a line is no merge, or its result is not in the vocabulary.
    """
    lines = read_text_file(path, flag="merges_path", wanted="BPE merges, two tokens per line").split("\n")
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        fields = line.split(" ")
        if len(fields) != 2 or not all(fields):
            raise DataFormatError(f"{path}:{number}: a merge is two tokens and one blank, but this is {line!r}")
        left, right = fields
        for token in (left, right, left + right):
            if token not in vocab:
                raise DataFormatError(
                    f"{path}:{number}: {token!r} is not in the vocabulary {vocab_path}; "
                    "the two files do not belong together"
                )
        merges.append((left, right))
    return merges


def vocabulary_has_all_bytes(vocab: Mapping[str, int]) -> bool:
    """Says whether every byte has a token, so that nothing is ever unknown."""
    return all(char in vocab for char in _BYTE_OF_CHAR)


def byte_level_text(token: str) -> str:
    """Turns the printable characters that stand for bytes back into text."""
    return bytearray(_BYTE_OF_CHAR.get(char, 0x3F) for char in token).decode("utf-8", errors="replace")


def _byte_of_char() -> dict[str, int]:
    """Pairs bytes with characters: printable Latin-1 stands for itself, the rest for U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR = _byte_of_char()
