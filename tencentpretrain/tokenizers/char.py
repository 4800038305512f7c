"""One token per character."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tencentpretrain.registry import TOKENIZERS
from tencentpretrain.tokenizers.base import Offsets, TokenIds, Tokenizer
from tencentpretrain.tokenizers.config import TokenizerConfig
from tencentpretrain.tokenizers.lookup import CharTable, code_points, text_bounds
from tencentpretrain.tokenizers.sources import open_vocabulary
from tencentpretrain.tokenizers.special_tokens import SpecialTokens


@TOKENIZERS.register("char")
class CharTokenizer(Tokenizer):
    """Strips a text and makes every character a token, blanks inside the text too; case is kept."""

    def __init__(self, tokens: Sequence[str], special: SpecialTokens, *, source: str) -> None:
        super().__init__(tokens, special, source=source, identity=())
        self._table = CharTable(self._char_id)

    @classmethod
    def from_config(cls, config: TokenizerConfig) -> CharTokenizer:
        """Opens the vocabulary."""
        tokens, special, source = open_vocabulary(config)
        return cls(tokens, special, source=source)

    def tokenize(self, text: str) -> list[str]:
        """Cuts a text into characters; unknown ones show as the unknown token."""
        return self.convert_ids_to_tokens(self.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Joins the characters."""
        return "".join(self.convert_ids_to_tokens(ids))

    def _char_id(self, char: str) -> int:
        return self.vocab.get(char, self.unk_id)

    def _encode_chunk(self, texts: Sequence[str]) -> tuple[TokenIds, Offsets]:
        stripped = [text.strip() for text in texts]
        ids = self._table[code_points("".join(stripped))]
        return ids.astype(np.uint32), text_bounds(stripped, gap=0)
