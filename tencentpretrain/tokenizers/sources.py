"""Where a vocabulary comes from: a text file, or the pieces of a SentencePiece model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tencentpretrain.errors import DataFormatError
from tencentpretrain.tokenizers.config import TokenizerConfig
from tencentpretrain.tokenizers.special_tokens import SpecialTokens, find_special_tokens
from tencentpretrain.tokenizers.vocabulary import check_file, read_vocabulary, refuse_duplicates

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


def open_vocabulary(config: TokenizerConfig) -> tuple[tuple[str, ...], SpecialTokens, str]:
    """Reads the tokens in the order of ids, from the SentencePiece model if one is given.

    Returns:
        The tokens, the special tokens among them, and the file they come from.

    Raises:
        ConfigError: a file or a special token is missing.
        DataFormatError: a file is not what it should be.
    """
    if config.spm_model_path:
        source = config.spm_model_path
        tokens = model_pieces(open_sentencepiece(source))
    else:
        source = config.vocab_path or ""
        tokens = read_vocabulary(source)
    refuse_duplicates(tokens, source)
    vocab = {token: index for index, token in enumerate(tokens)}
    return tokens, find_special_tokens(vocab, source=source, map_path=config.special_tokens_map), source


def open_sentencepiece(path: str) -> SentencePieceProcessor:
    """Opens a SentencePiece model.

    Raises:
        ConfigError: there is no such file.
        DataFormatError: the file is no SentencePiece model.
    """
    import sentencepiece

    check_file(path, flag="spm_model_path", wanted="a SentencePiece model", binary=True)
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataFormatError(f"{path}: not a usable SentencePiece model, perhaps cut short ({error})") from None


def model_pieces(model: SentencePieceProcessor) -> tuple[str, ...]:
    """Returns the pieces of a SentencePiece model in the order of ids."""
    return tuple(model.id_to_piece(list(range(model.get_piece_size()))))
