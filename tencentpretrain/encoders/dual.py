"""Two encoders side by side (siamese models, CLIP)."""

from __future__ import annotations

from torch import Tensor

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Stream
from tencentpretrain.encoders.base import Encoder
from tencentpretrain.layers.build import required
from tencentpretrain.registry import ENCODERS


@ENCODERS.register("dual")
class DualEncoder(Encoder):
    """One encoder per stream; a model that ties its weights has one object for both."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        streams = required(config.streams, "stream_0 and stream_1", "encoder 'dual'")
        self.encoder_0 = ENCODERS.get(streams[0].encoder)(streams[0])
        self.encoder_1 = self.encoder_0 if config.tie_weights else ENCODERS.get(streams[1].encoder)(streams[1])

    def forward(self, emb: Stream, segment_ids: Stream, has_padding: bool = True) -> tuple[Tensor, Tensor]:
        first = self.encoder_0(emb[0], segment_ids[0], has_padding)
        second = self.encoder_1(emb[1], segment_ids[1], has_padding)
        return first, second
