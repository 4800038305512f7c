"""The tokenizer of models that read no text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import TOKENIZERS
from tencentpretrain.tokenizers.base import Offsets, TokenIds, Tokenizer
from tencentpretrain.tokenizers.config import TokenizerConfig
from tencentpretrain.tokenizers.special_tokens import BERT_NAMES, SpecialTokens


@TOKENIZERS.register("virtual")
class VirtualTokenizer(Tokenizer):
    """An empty vocabulary. All special ids are 0, the id of padding; text is refused."""

    @classmethod
    def from_config(cls, config: TokenizerConfig) -> VirtualTokenizer:
        """Opens nothing."""
        special = SpecialTokens(names=BERT_NAMES, pad_id=0, unk_id=0, cls_id=0, sep_id=0)
        return cls((), special, source="tokenizer 'virtual'", identity=())

    def tokenize(self, text: str) -> list[str]:
        """Refuses text.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "tokenizer: 'virtual' has no vocabulary and cannot read text; choose another --tokenizer for this corpus"
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Refuses ids, as none exist."""
        return "".join(self.convert_ids_to_tokens(ids))

    def _encode_chunk(self, texts: Sequence[str]) -> tuple[TokenIds, Offsets]:
        self.tokenize(texts[0])
        raise AssertionError("tokenize refuses all text")
