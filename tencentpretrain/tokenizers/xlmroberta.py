"""XLM-RoBERTa's order of ids over a SentencePiece model (Conneau et al., 2020, arXiv:1911.02116)."""

from __future__ import annotations

from collections.abc import Sequence

from tencentpretrain.registry import TOKENIZERS
from tencentpretrain.tokenizers.sentencepiece import SentencePieceTokenizer
from tencentpretrain.tokenizers.special_tokens import XLMROBERTA_NAMES, SpecialTokens

_FIRST = ("<s>", "<pad>", "</s>", "<unk>")
_LAST = "<mask>"


@TOKENIZERS.register("xlmroberta")
class XlmRobertaTokenizer(SentencePieceTokenizer):
    """Ids: `<s> <pad> </s> <unk>`, then the model's other pieces in its order, then `<mask>`."""

    names = XLMROBERTA_NAMES

    def vocabulary(self, pieces: Sequence[str]) -> tuple[str, ...]:
        """Puts the special tokens where XLM-RoBERTa has them."""
        special = {*_FIRST, _LAST}
        return (*_FIRST, *(piece for piece in pieces if piece not in special), _LAST)

    def unknown_id(self, special: SpecialTokens) -> int:
        """Returns the id of `<unk>`, whatever the model calls its own unknown piece."""
        return special.unk_id
