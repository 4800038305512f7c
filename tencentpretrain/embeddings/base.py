"""The container that sums a model's embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Stream
from tencentpretrain.errors import ConfigError
from tencentpretrain.layers.build import plain_norm, required
from tencentpretrain.layers.dropout import Dropout
from tencentpretrain.registry import EMBEDDINGS


class EmbeddingPart(nn.Module, ABC):
    """One summand.

    A subclass is built as `cls(config, vocab_size, pad_id=...)`, where `config` is the stream's own for dual models.
    """

    @abstractmethod
    def forward(
        self, token_ids: Tensor, segment_ids: Tensor, *, start: int = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        """Returns (B, S, E).

        Shapes:
            token_ids, segment_ids: (B, S).
            start: positions before the first one, where a sequence is read piece by piece.
            position_ids: (B, S) the position of each token, where it is not its place in the row.
        """


class Embedding(nn.Module):
    """Dropout(norm(sum of the parts)); each part is a child under its registered name.

    The name `dual` stands alone: its two streams have containers of their own.

    Args:
        config: the model, or the stream of a dual model.
        names: the parts, in the order of the sum.
        vocab_size: rows of the word table.
        pad_id: padding token of the vocabulary.
    """

    def __init__(self, config: ModelConfig, names: tuple[str, ...], vocab_size: int, *, pad_id: int = 0) -> None:
        super().__init__()
        if not names:
            raise ConfigError("embedding names no part; the usual choice is word, pos and seg")
        if "dual" in names and len(names) > 1:
            raise ConfigError(f"embedding 'dual' cannot be combined with others, but the list is {list(names)}")
        self.names = tuple(EMBEDDINGS.canonical(name) for name in names)
        for name in self.names:
            self.add_module(name, EMBEDDINGS.get(name)(config, vocab_size, pad_id=pad_id))
        self.is_dual = "dual" in self.names
        self.layer_norm: nn.Module | None = None
        self.dropout: nn.Module | None = None
        if not self.is_dual:
            if config.embedding_layernorm:
                self.layer_norm = plain_norm(config, required(config.emb_size, "emb_size", "the embedding"))
            self.dropout = Dropout(config.dropout)

    def forward(
        self, token_ids: Stream, segment_ids: Stream, *, start: int = 0, position_ids: Tensor | None = None
    ) -> Stream:
        """Returns (B, S, E), or a pair of them for dual models.

        Shapes:
            token_ids, segment_ids: (B, S) int64; pairs for dual models.
            position_ids: (B, S) int64, where several documents share a row; not for dual models.
        """
        if self.is_dual:
            streams: Stream = self._modules["dual"](token_ids, segment_ids)  # type: ignore[misc]
            return streams
        # Fixed positions are computed in float32 whatever the weights are.
        dtype = next(self.parameters()).dtype
        total: Tensor | None = None
        for name in self.names:
            part: Tensor = self._modules[name](  # type: ignore[misc]
                token_ids, segment_ids, start=start, position_ids=position_ids
            )
            part = part.to(dtype)
            total = part if total is None else total + part
        assert total is not None
        if self.layer_norm is not None:
            total = self.layer_norm(total)
        if self.dropout is not None:
            total = self.dropout(total)
        return total
