"""BERT's tokenizer: basic tokenizer, then WordPiece (Devlin et al., 2019, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordPiece

from tencentpretrain.registry import TOKENIZERS
from tencentpretrain.tokenizers.base import Offsets, TokenIds, Tokenizer, is_cjk, pack, replace_surrogates
from tencentpretrain.tokenizers.basic import basic_words, is_dropped, is_punctuation, is_space
from tencentpretrain.tokenizers.config import TokenizerConfig
from tencentpretrain.tokenizers.lookup import (
    CharTable,
    WordCache,
    code_points,
    offsets_from_counts,
    pieces,
    text_bounds,
)
from tencentpretrain.tokenizers.special_tokens import SpecialTokens, find_special_tokens
from tencentpretrain.tokenizers.vocabulary import read_vocabulary

MAX_WORD_CHARS = 200
"""A longer word is unknown as a whole."""

# Classes of characters that have no id of their own; an id (>= 0) in the table means that the character is one token.
_PART_OF_WORD, _SPACE, _DROPPED = -1, -2, -3
_CAPITAL_SIGMA = "\u03a3"  # the only character whose lower case depends on its neighbours


@TOKENIZERS.register("bert")
class WordPieceTokenizer(Tokenizer):
    """Words are cut greedily into the longest pieces of the vocabulary; `##` marks a piece that continues a word.

    CJK characters and punctuation, which never depend on their neighbours, are looked up in a table in bulk; other
    words go through the Rust WordPiece once and come from a cache after that.
    """

    def __init__(self, tokens: Sequence[str], special: SpecialTokens, *, do_lower_case: bool, source: str) -> None:
        super().__init__(tokens, special, source=source, identity=[f"do_lower_case={do_lower_case}"])
        self._lower = do_lower_case
        model = WordPiece(dict(self.vocab), unk_token=special.names.unk, max_input_chars_per_word=MAX_WORD_CHARS)
        self._rust = RustTokenizer(model)
        self._table = CharTable(self._char_value)
        self._words = WordCache(self._encode_new_words)

    @classmethod
    def from_config(cls, config: TokenizerConfig) -> Tokenizer:
        """Opens the vocabulary, or the SentencePiece model where one is given."""
        if config.spm_model_path:
            from tencentpretrain.tokenizers.sentencepiece import SentencePieceTokenizer

            return SentencePieceTokenizer.from_config(config)
        path = config.vocab_path or ""
        tokens = read_vocabulary(path)
        vocab = {token: index for index, token in enumerate(tokens)}
        special = find_special_tokens(vocab, source=path, map_path=config.special_tokens_map)
        return cls(tokens, special, do_lower_case=config.do_lower_case, source=path)

    def tokenize(self, text: str) -> list[str]:
        """Cuts a text into tokens; unknown words show as the unknown token."""
        return self.convert_ids_to_tokens(self.encode(text))

    def encode_plain(self, text: str) -> list[int]:
        """Encodes one text character by character, without table and cache: the definition the fast path is held to."""
        return list(self._encode_words([text])[0])

    def decode(self, ids: Iterable[int]) -> str:
        """Joins pieces to words and words by blanks; no blank between CJK characters."""
        text = ""
        for token in self.convert_ids_to_tokens(ids):
            if token.startswith("##") and len(token) > 2:
                text += token[2:]
            elif not text or (_is_east_asian(text[-1]) and _is_east_asian(token[:1])):
                text += token
            else:
                text += " " + token
        return text

    def _encode_chunk(self, texts: Sequence[str]) -> tuple[TokenIds, Offsets]:
        text = "\n".join(texts) + "\n"
        bounds = text_bounds(texts, gap=1)
        points = code_points(text)
        values = self._table[points]
        dropped = values == _DROPPED
        if dropped.any():
            kept = ~dropped
            before = np.zeros(len(points) + 1, np.int64)
            np.cumsum(kept, out=before[1:])
            points, values, bounds = points[kept], values[kept], before[bounds]
            text = points.tobytes().decode("utf-32-le", "surrogatepass")
        if self._lower and _CAPITAL_SIGMA in text:
            values = self._keep_punctuation_in_words(points, values)

        in_word = np.zeros(len(values) + 2, bool)  # one more at either end, so that every word has two edges
        np.equal(values, _PART_OF_WORD, out=in_word[1:-1])
        edges = np.flatnonzero(in_word[1:] != in_word[:-1])
        starts, ends = edges[::2], edges[1::2]
        word_ids, word_lengths = self._words.lookup(pieces(text, starts, ends))

        counts = (values >= 0).astype(np.int64)
        counts[starts] = word_lengths
        ids = np.repeat(values, counts)
        ids[ids < 0] = word_ids
        return ids.astype(np.uint32), offsets_from_counts(counts, bounds)

    def _keep_punctuation_in_words(self, points: NDArray[np.uint32], values: NDArray[np.int32]) -> NDArray[np.int32]:
        """Lets words run over punctuation, so that lower-casing sees all neighbours of a capital sigma."""
        alone = values >= 0
        for point in np.unique(points[alone]).tolist():
            if is_cjk(chr(point)):
                alone &= points != point
        return np.where(alone, np.int32(_PART_OF_WORD), values)

    def _char_value(self, char: str) -> int:
        if is_dropped(char):
            return _DROPPED
        if is_space(char):
            return _SPACE
        if is_cjk(char) or is_punctuation(char):
            (token_id,) = self._encode_words([char])[0]
            return token_id
        return _PART_OF_WORD

    def _encode_new_words(self, words: list[str]) -> tuple[TokenIds, Offsets]:
        return pack(self._encode_words(words))

    def _encode_words(self, words: list[str]) -> list[list[int]]:
        # No vocabulary has NUL, so a half surrogate, which Rust does not take, makes its word unknown.
        split = [[replace_surrogates(part, "\x00") for part in basic_words(word, lower=self._lower)] for word in words]
        encodings = self._rust.encode_batch_fast(split, is_pretokenized=True, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _surface(self, token: str) -> tuple[str, bool]:
        if token.startswith("##") and len(token) > 2:
            return token[2:], False
        return token, True

    def _find_word_flags(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        begins = np.fromiter((self._surface(token)[1] for token in self.tokens), bool, self.vocab_size)
        return begins, np.zeros_like(begins)  # every piece says by itself whether it continues a word


def _is_east_asian(char: str) -> bool:
    return is_cjk(char) or "\u3000" <= char <= "\u30ff" or "\uff00" <= char <= "\uffef"
