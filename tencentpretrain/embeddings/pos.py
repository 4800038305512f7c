"""Learned positions."""

from __future__ import annotations

from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.embeddings.base import EmbeddingPart
from tencentpretrain.errors import DataFormatError
from tencentpretrain.layers.build import required
from tencentpretrain.registry import EMBEDDINGS


@EMBEDDINGS.register("pos")
class PositionEmbedding(EmbeddingPart):
    """A learned vector per position, padding included."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, pad_id: int = 0) -> None:
        super().__init__()
        length = config.max_seq_length
        if "speech" in config.embedding:
            length = max(length, config.max_audio_frames)
        self.embedding = nn.Embedding(length, required(config.emb_size, "emb_size", "embedding 'pos'"))

    def forward(
        self, token_ids: Tensor, segment_ids: Tensor, *, start: int = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        end = start + segment_ids.size(1)
        if end > self.embedding.num_embeddings:
            raise DataFormatError(
                f"a sequence of {end} positions does not fit the {self.embedding.num_embeddings} learned positions; "
                "shorten the sequences (--seq_length) or raise max_seq_length"
            )
        if position_ids is not None:
            vectors: Tensor = self.embedding(position_ids)
            return vectors
        # An embedding lookup of the positions 0, 1, 2, ... is the table's first rows.
        return self.embedding.weight[start:end].unsqueeze(0).expand(segment_ids.size(0), -1, -1)


@EMBEDDINGS.register("seg")
class SegmentEmbedding(EmbeddingPart):
    """A vector per segment id: 0 padding, 1 first segment, 2 second segment."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, pad_id: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, required(config.emb_size, "emb_size", "embedding 'seg'"))

    def forward(
        self, token_ids: Tensor, segment_ids: Tensor, *, start: int = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        vectors: Tensor = self.embedding(segment_ids)
        return vectors
