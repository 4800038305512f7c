"""A tokenizer saved by Hugging Face `transformers`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tencentpretrain.errors import ConfigError, DataFormatError
from tencentpretrain.registry import TOKENIZERS
from tencentpretrain.tokenizers.base import Offsets, TokenIds, Tokenizer, pack, replace_surrogates
from tencentpretrain.tokenizers.bpe import byte_level_text
from tencentpretrain.tokenizers.config import TokenizerConfig
from tencentpretrain.tokenizers.sentencepiece import WORD_MARK
from tencentpretrain.tokenizers.special_tokens import (
    SpecialTokenNames,
    detect_special_token_names,
    find_special_tokens,
)

_BYTE_LEVEL_BLANK = "\u0120"


@TOKENIZERS.register("hfpretrained")
class HuggingFaceTokenizer(Tokenizer):
    """Wraps `AutoTokenizer` of a local folder (or a name in the local Hugging Face cache); no special tokens are added.

    The names of special tokens inside raw text become special tokens, as everywhere with that library.

    The special tokens come from the map, or are found from the vocabulary, or are those the folder itself declares.
    """

    def __init__(self, folder: str, *, map_path: str | None) -> None:
        self._tokenizer = _open(folder)
        by_token: dict[str, int] = self._tokenizer.get_vocab()
        tokens = _tokens_by_id(by_token)
        names = None
        if map_path is None and detect_special_token_names(by_token) is None:
            names = _declared_names(self._tokenizer, folder)
        special = find_special_tokens(by_token, source=folder, map_path=map_path, names=names)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)  # None: a tokenizer written in Python
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        self._backend = backend
        identity = backend.to_str() if backend is not None else json.dumps(self._tokenizer.init_kwargs, default=str)
        super().__init__(tokens, special, source=folder, identity=[identity])
        self._declared_special = frozenset(self._tokenizer.all_special_ids)
        self._continues_with_hashes = any(token.startswith("##") for token in tokens) and "[CLS]" in by_token
        self._byte_level = not self._continues_with_hashes and any(
            token.startswith(_BYTE_LEVEL_BLANK) for token in tokens
        )

    @classmethod
    def from_config(cls, config: TokenizerConfig) -> HuggingFaceTokenizer:
        """Opens the folder that `vocab_path` names."""
        return cls(config.vocab_path or "", map_path=config.special_tokens_map)

    def tokenize(self, text: str) -> list[str]:
        """Cuts a text into tokens."""
        tokens: list[str] = self._tokenizer.tokenize(replace_surrogates(text))
        return tokens

    def decode(self, ids: Iterable[int]) -> str:
        """Joins tokens to a text."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def _encode_chunk(self, texts: Sequence[str]) -> tuple[TokenIds, Offsets]:
        clean = [replace_surrogates(text) for text in texts]
        if self._backend is not None:
            return pack([encoding.ids for encoding in self._backend.encode_batch_fast(clean, add_special_tokens=False)])
        encoded = self._tokenizer(
            clean, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return pack(encoded["input_ids"])

    def _is_reserved(self, index: int) -> bool:
        return index in self._declared_special

    def _surface(self, token: str) -> tuple[str, bool]:
        if self._continues_with_hashes:
            return (token[2:], False) if token.startswith("##") else (token, True)
        if self._byte_level:
            text = byte_level_text(token)
            return text.lstrip(), text[:1].isspace()
        return (token[1:], True) if token.startswith(WORD_MARK) else (token, False)


def _open(folder: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "tokenizer: 'hfpretrained' needs transformers; install it with `pip install tencentpretrain[hf]`"
        ) from None
    if Path(folder).is_file():
        folder = str(Path(folder).parent)
    try:
        # Only local files: a misspelt folder must not become a question to a server.
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataFormatError(
            f"{folder}: --vocab_path of --tokenizer hfpretrained is the folder of a Hugging Face tokenizer ({reason})"
        ) from None


def _tokens_by_id(by_token: dict[str, int]) -> list[str]:
    """Orders the tokens by id. An id that no token has gets a reserved name, so that ids and rows agree."""
    tokens = [f"[unused{index}]" for index in range(max(by_token.values(), default=-1) + 1)]
    taken = set(by_token)
    for index, name in enumerate(tokens):
        if name in taken:
            tokens[index] = f"<|hole_{index}|>"
    for token, index in by_token.items():
        tokens[index] = token
    return tokens


def _declared_names(tokenizer: Any, folder: str) -> SpecialTokenNames | None:
    end = tokenizer.sep_token or tokenizer.eos_token
    begin = tokenizer.cls_token or tokenizer.bos_token or end
    pad = tokenizer.pad_token or end
    if end is None or begin is None:
        return None
    return SpecialTokenNames(
        pad=pad, unk=tokenizer.unk_token or pad, cls=begin, sep=end, mask=tokenizer.mask_token, sentinel=None
    )
