"""Masked language modelling (Devlin et al. 2019, arXiv:1810.04805, section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.layers.activations import ACTIVATIONS
from tencentpretrain.layers.blocks import TapPoint
from tencentpretrain.layers.build import plain_norm, required
from tencentpretrain.registry import TARGETS
from tencentpretrain.targets.base import LossSum, Target
from tencentpretrain.targets.loss import projected_cross_entropy_sum


@TARGETS.register("mlm")
class MlmTarget(Target):
    """Predicts the token at each position whose label is above 0.

    The head is linear_2(norm(act(linear_1 x))); with a factorised embedding it passes through emb_size.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, pad_id: int = 0) -> None:
        super().__init__()
        hidden_size = required(config.hidden_size, "hidden_size", "target 'mlm'")
        size = hidden_size
        if config.factorized_embedding:
            size = required(config.emb_size, "emb_size", "target 'mlm'")
        self.activation = ACTIVATIONS[required(config.hidden_act, "hidden_act", "target 'mlm'")]
        self.linear_1 = nn.Linear(hidden_size, size)
        self.layer_norm = plain_norm(config, size)
        self.linear_2 = nn.Linear(size, vocab_size)
        self.logits = TapPoint()

    def predict(self, hidden: Tensor) -> Tensor:
        """Returns (..., V) logits for hidden (..., H)."""
        logits: Tensor = self.linear_2(self._transformed(hidden))
        return logits

    def _transformed(self, hidden: Tensor) -> Tensor:
        transformed: Tensor = self.layer_norm(self.activation(self.linear_1(hidden)))
        return transformed

    def forward(self, hidden: Tensor, batch: Batch, segment_ids: Tensor) -> dict[str, LossSum]:  # type: ignore[override]
        labels = batch.labels["mlm"].flatten()
        chosen = (labels > 0).nonzero().squeeze(1)
        rows = hidden.flatten(0, 1).index_select(0, chosen)
        return {"mlm": self.score(rows, labels.index_select(0, chosen))}

    def score(self, rows: Tensor, labels: Tensor) -> LossSum:
        """Returns the loss of hidden states (N, H) with labels (N,)."""
        rows = self._transformed(rows)
        return projected_cross_entropy_sum(self.linear_2, rows, labels, self.logits, fused=self.fused_loss)
