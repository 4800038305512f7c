"""Tokenizers: one file per kind, found by name through `registry.TOKENIZERS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import TOKENIZERS
from tencentpretrain.tokenizers.config import TokenizerConfig

if TYPE_CHECKING:
    from tencentpretrain.tokenizers.base import Tokenizer

__all__ = ["TokenizerConfig", "build_tokenizer"]


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Builds the tokenizer that a configuration describes.

    Raises:
        ConfigError: the configuration contradicts itself, a file or a special token is missing.
        DataFormatError: a file is not what it should be.
    """
    problems = list(config.problems())
    if problems:
        raise ConfigError(problems, source="tokenizer")
    tokenizer: Tokenizer = TOKENIZERS.get(config.tokenizer).from_config(config)
    return tokenizer
