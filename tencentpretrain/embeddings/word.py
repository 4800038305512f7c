"""Token vectors."""

from __future__ import annotations

import math

from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.embeddings.base import EmbeddingPart
from tencentpretrain.layers.build import required
from tencentpretrain.registry import EMBEDDINGS


@EMBEDDINGS.register("word")
class WordEmbedding(EmbeddingPart):
    """A vector per token id, times the root of its width where positions are sinusoidal (arXiv:1706.03762, 3.4)."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, pad_id: int = 0) -> None:
        super().__init__()
        emb_size = required(config.emb_size, "emb_size", "embedding 'word'")
        self.embedding = nn.Embedding(vocab_size, emb_size)
        # The source list decides for the target side too: published models depend on it.
        self.scale = math.sqrt(emb_size) if "sinusoidalpos" in config.embedding else 1.0

    def forward(
        self, token_ids: Tensor, segment_ids: Tensor, *, start: int = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        vectors: Tensor = self.embedding(token_ids)
        return vectors * self.scale if self.scale != 1.0 else vectors
