"""Two streams side by side (siamese models, CLIP)."""

from __future__ import annotations

from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Stream
from tencentpretrain.embeddings.base import Embedding
from tencentpretrain.layers.build import plain_norm, required
from tencentpretrain.layers.dropout import Dropout
from tencentpretrain.registry import EMBEDDINGS


@EMBEDDINGS.register("dual")
class DualEmbedding(nn.Module):
    """Two embedding containers, one object for both if the model ties its weights.

    Published models norm and drop out each stream a second time; `dual_layernorm` false leaves both out.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, pad_id: int = 0) -> None:
        super().__init__()
        streams = required(config.streams, "stream_0 and stream_1", "embedding 'dual'")
        self.embedding_0 = Embedding(streams[0], streams[0].embedding, vocab_size, pad_id=pad_id)
        if config.tie_weights:
            self.embedding_1 = self.embedding_0
        else:
            self.embedding_1 = Embedding(streams[1], streams[1].embedding, vocab_size, pad_id=pad_id)
        second = config.dual_layernorm
        self.stream_0_layer_norm = self._norm(streams[0]) if second else None
        self.stream_1_layer_norm = self._norm(streams[1]) if second else None
        self.dropout = Dropout(config.dropout if second else 0.0)

    @staticmethod
    def _norm(stream: ModelConfig) -> nn.Module | None:
        if not stream.embedding_layernorm:
            return None
        return plain_norm(stream, required(stream.emb_size, "emb_size", "embedding 'dual'"))

    def forward(self, token_ids: Stream, segment_ids: Stream) -> tuple[Tensor, Tensor]:
        """Returns both embedded streams.

        Shapes:
            token_ids, segment_ids: pairs of (B, S).
        """
        first = self.embedding_0(token_ids[0], segment_ids[0])
        second = self.embedding_1(token_ids[1], segment_ids[1])
        if self.stream_0_layer_norm is not None:
            first = self.stream_0_layer_norm(first)
        if self.stream_1_layer_norm is not None:
            second = self.stream_1_layer_norm(second)
        return self.dropout(first), self.dropout(second)
