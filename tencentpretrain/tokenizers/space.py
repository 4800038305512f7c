"""One token per word between single blanks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np

from tencentpretrain.registry import TOKENIZERS
from tencentpretrain.tokenizers.base import Offsets, TokenIds, Tokenizer
from tencentpretrain.tokenizers.config import TokenizerConfig
from tencentpretrain.tokenizers.sources import open_vocabulary
from tencentpretrain.tokenizers.special_tokens import SpecialTokens


@TOKENIZERS.register("space")
class SpaceTokenizer(Tokenizer):
    """Strips a text and splits it at single blanks: two blanks in a row hold an unknown empty word between them."""

    def __init__(self, tokens: Sequence[str], special: SpecialTokens, *, source: str) -> None:
        super().__init__(tokens, special, source=source, identity=())

    @classmethod
    def from_config(cls, config: TokenizerConfig) -> SpaceTokenizer:
        """Opens the vocabulary."""
        tokens, special, source = open_vocabulary(config)
        return cls(tokens, special, source=source)

    def tokenize(self, text: str) -> list[str]:
        """Cuts a text into words; unknown ones show as the unknown token."""
        return self.convert_ids_to_tokens(self.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Joins the words by blanks."""
        return " ".join(self.convert_ids_to_tokens(ids))

    def _encode_chunk(self, texts: Sequence[str]) -> tuple[TokenIds, Offsets]:
        words: list[str] = []
        offsets = np.zeros(len(texts) + 1, np.int64)
        for row, text in enumerate(texts, start=1):
            words += text.strip().split(" ")
            offsets[row] = len(words)
        ids = np.fromiter(map(self.vocab.get, words, repeat(self.unk_id)), np.uint32, len(words))
        return ids, offsets
