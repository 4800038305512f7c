"""SentencePiece (Kudo and Richardson, 2018, arXiv:1808.06226): `bert` with a model, and `xlmroberta`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tencentpretrain.tokenizers.base import Offsets, TokenIds, Tokenizer, pack, replace_surrogates
from tencentpretrain.tokenizers.config import TokenizerConfig
from tencentpretrain.tokenizers.sources import model_pieces, open_sentencepiece
from tencentpretrain.tokenizers.special_tokens import SpecialTokenNames, SpecialTokens, find_special_tokens
from tencentpretrain.tokenizers.vocabulary import refuse_duplicates

WORD_MARK = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """Pieces of a SentencePiece model; normalisation is the model's own.

    A piece that ends in a digit and a comma is split again so that the comma stands alone, as ALBERT and XLNet do,
    except that the word mark which encoding the rest by itself puts in front stays, as in published data sets.
    """

    names: SpecialTokenNames | None = None
    """Special-token names that this kind fixes; None: found from the vocabulary."""

    def __init__(self, model_path: str, *, map_path: str | None) -> None:
        self._model = open_sentencepiece(model_path)
        self._pieces = model_pieces(self._model)
        refuse_duplicates(self._pieces, model_path)
        tokens = self.vocabulary(self._pieces)
        vocab = {token: index for index, token in enumerate(tokens)}
        special = find_special_tokens(vocab, source=model_path, map_path=map_path, names=self.names)
        super().__init__(tokens, special, source=model_path, identity=[Path(model_path).read_bytes()])
        self._unk_id = self.unknown_id(special)
        self._ids = np.fromiter(
            (vocab.get(piece, self._unk_id) for piece in self._pieces), np.uint32, len(self._pieces)
        )
        self._ids[self._model.unk_id()] = self._unk_id
        self._needs_split = np.fromiter(map(_ends_in_digit_comma, self._pieces), bool, len(self._pieces))
        if "," not in vocab:  # only then can unknown text end in a comma, and what it ends in is only seen in the text
            self._needs_split[self._model.unk_id()] = True

    @classmethod
    def from_config(cls, config: TokenizerConfig) -> SentencePieceTokenizer:
        """Opens the SentencePiece model."""
        return cls(config.spm_model_path or "", map_path=config.special_tokens_map)

    def vocabulary(self, pieces: Sequence[str]) -> tuple[str, ...]:
        """Returns the tokens in the order of ids, given the pieces in the order of the model."""
        return tuple(pieces)

    def unknown_id(self, special: SpecialTokens) -> int:
        """Returns the id of text that the model does not know."""
        unknown: int = self._model.unk_id()
        return unknown

    def tokenize(self, text: str) -> list[str]:
        """Cuts a text into pieces; unknown text shows as itself."""
        pieces: list[str] = []
        for piece in self._model.encode(replace_surrogates(text), out_type=str):
            pieces += self._split_comma(piece) if _ends_in_digit_comma(piece) else [piece]
        return pieces

    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]:
        """Looks pieces up; one that is not in the vocabulary becomes the model's unknown id."""
        return [self.vocab.get(token, self._unk_id) for token in tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """Joins pieces to a text."""
        text = "".join(self.convert_ids_to_tokens(ids)).replace(WORD_MARK, " ")
        return text.removeprefix(" ")

    def _encode_chunk(self, texts: Sequence[str]) -> tuple[TokenIds, Offsets]:
        rows: list[Sequence[int]] = self._model.encode(
            [replace_surrogates(text) for text in texts], out_type=int, num_threads=1
        )
        model_ids, offsets = pack(rows)
        ids = self._ids[model_ids]
        doubtful = self._needs_split[model_ids]
        if not doubtful.any():
            return ids, offsets
        final: list[Sequence[int]] = []
        for row, text in enumerate(texts):
            span = slice(offsets[row], offsets[row + 1])
            exact = self.convert_tokens_to_ids(self.tokenize(text)) if doubtful[span].any() else ids[span]
            final.append(exact)  # type: ignore[arg-type]
        return pack(final)

    def _split_comma(self, piece: str) -> list[str]:
        parts: list[str] = self._model.encode(piece[:-1].replace(WORD_MARK, ""), out_type=str)
        return [*parts, ","]

    def _is_reserved(self, index: int) -> bool:
        model, token = self._model, self.tokens[index]
        model_id = model.piece_to_id(token)
        if self._pieces[model_id] != token:
            return True  # added beside the model's pieces
        kinds = (model.is_control, model.is_unknown, model.is_unused, model.is_byte)
        return any(is_kind(model_id) for is_kind in kinds)

    def _surface(self, token: str) -> tuple[str, bool]:
        return (token[1:], True) if token.startswith(WORD_MARK) else (token, False)


def _ends_in_digit_comma(piece: str) -> bool:
    return len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit()
