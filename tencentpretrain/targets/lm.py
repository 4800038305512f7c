"""Language modelling: each position predicts its label, for decoder-only and encoder-decoder models."""

from __future__ import annotations

from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import IGNORE_LABEL, Batch
from tencentpretrain.layers.blocks import TapPoint
from tencentpretrain.layers.build import required
from tencentpretrain.registry import TARGETS
from tencentpretrain.targets.base import LossSum, Target
from tencentpretrain.targets.loss import projected_cross_entropy_sum, smoothed_sum


@TARGETS.register("lm")
class LmTarget(Target):
    """Predicts the label of every real position, or of segment 2 alone with `prefix_lm_loss`.

    Labels equal to IGNORE_LABEL never count. With `lm_scale`, hidden states are first multiplied by H^-0.5 (T5,
    Raffel et al. 2020).
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, pad_id: int = 0) -> None:
        super().__init__()
        hidden_size = required(config.hidden_size, "hidden_size", "target 'lm'")
        self.output_layer = nn.Linear(hidden_size, vocab_size, bias=config.lm_bias)
        self.scale = hidden_size**-0.5 if config.lm_scale else 1.0
        self.first_segment = 2 if config.prefix_lm_loss else 1
        self.smoothing = config.label_smoothing
        self.ignored_label = pad_id if config.ignore_index else None
        self.logits = TapPoint()

    def predict(self, hidden: Tensor) -> Tensor:
        """Returns (..., V) logits for hidden (..., H)."""
        logits: Tensor = self.output_layer(self._scaled(hidden))
        return logits

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale if self.scale != 1.0 else hidden

    def forward(self, hidden: Tensor, batch: Batch, segment_ids: Tensor) -> dict[str, LossSum]:  # type: ignore[override]
        labels = batch.labels["lm"].flatten()
        rows = hidden.flatten(0, 1)
        whole = self.first_segment == 1 and batch.decoder_segment_ids is None and not batch.has_padding
        if not whole:
            # Finding the rows costs a wait for the device, but spares their projection onto the vocabulary.
            counted = (segment_ids.flatten() >= self.first_segment) & (labels != IGNORE_LABEL)
            chosen = counted.nonzero().squeeze(1)
            rows, labels = rows.index_select(0, chosen), labels.index_select(0, chosen)
        return {"lm": self.score(rows, labels)}

    def score(self, rows: Tensor, labels: Tensor) -> LossSum:
        """Returns the loss of hidden states (N, H) with labels (N,)."""
        if self.smoothing is None:
            scaled = self._scaled(rows)
            return projected_cross_entropy_sum(self.output_layer, scaled, labels, self.logits, fused=self.fused_loss)
        logits = self.logits(self.predict(rows))
        return smoothed_sum(logits, labels, smoothing=self.smoothing, ignored_label=self.ignored_label)
