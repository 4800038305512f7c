"""Which tokenizer a run uses and where its files are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

from tencentpretrain.config.base import Section, setting
from tencentpretrain.config.names import name_problem
from tencentpretrain.registry import TOKENIZERS


class TokenizerConfig(Section):
    """One tokenizer. The target side of a translation model is a second, independent value of this class."""

    tokenizer: str = setting("bert", "kind of tokenizer", topic="tokenizer")
    vocab_path: Optional[str] = setting(None, "vocabulary, one token per line", topic="tokenizer")
    merges_path: Optional[str] = setting(None, "merges of a byte-level BPE", topic="tokenizer")
    spm_model_path: Optional[str] = setting(None, "SentencePiece model; replaces the vocabulary", topic="tokenizer")
    do_lower_case: bool = setting(True, "bert: lower-case and strip accents (true or false)", topic="tokenizer")
    special_tokens_map: Optional[str] = setting(
        None, "JSON with the names of the special tokens; found from the vocabulary if absent", topic="tokenizer"
    )

    def problems(self) -> Iterator[str]:
        """Yields what is missing or contradictory, before any file is opened."""
        problem = name_problem("tokenizer", self.tokenizer)
        if problem:
            yield f"tokenizer: {problem}"
            return
        kind = TOKENIZERS.canonical(self.tokenizer)
        if kind == "bpe":
            if not self.vocab_path:
                yield "vocab_path: tokenizer 'bpe' needs a vocabulary"
            if not self.merges_path:
                yield "merges_path: tokenizer 'bpe' needs the merges that belong to the vocabulary"
            if self.spm_model_path:
                yield "spm_model_path: has no effect with tokenizer 'bpe'; leave it out"
        elif kind == "xlmroberta":
            if not self.spm_model_path:
                yield "spm_model_path: tokenizer 'xlmroberta' needs a SentencePiece model"
        elif kind == "hfpretrained":
            if not self.vocab_path:
                yield "vocab_path: tokenizer 'hfpretrained' needs the folder of a Hugging Face tokenizer"
        elif kind != "virtual" and not (self.vocab_path or self.spm_model_path):
            yield f"vocab_path: tokenizer {kind!r} needs a vocabulary (or spm_model_path)"
        if self.merges_path and kind not in ("bpe", "virtual"):
            yield f"merges_path: has no effect with tokenizer {kind!r}; leave it out, or use tokenizer 'bpe'"
