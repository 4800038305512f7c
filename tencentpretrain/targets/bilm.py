"""Language modelling in both directions (ELMo, Peters et al. 2018, arXiv:1802.05365, section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import IGNORE_LABEL, Batch
from tencentpretrain.errors import ConfigError
from tencentpretrain.layers.blocks import TapPoint
from tencentpretrain.layers.build import required
from tencentpretrain.registry import TARGETS
from tencentpretrain.targets.base import LossSum, Target
from tencentpretrain.targets.loss import projected_cross_entropy_sum


@TARGETS.register("bilm")
class BilmTarget(Target):
    """The forward half of the features predicts the next token, the backward half the one before.

    Both use one output layer; the losses are named bilm_forward and bilm_backward.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, pad_id: int = 0) -> None:
        super().__init__()
        hidden_size = required(config.hidden_size, "hidden_size", "target 'bilm'")
        if hidden_size % 2:
            raise ConfigError(f"target 'bilm' needs an even hidden_size, but it is {hidden_size}")
        self.output_layer = nn.Linear(hidden_size // 2, vocab_size, bias=config.lm_bias)
        self.logits_forward = TapPoint()
        self.logits_backward = TapPoint()

    def forward(self, hidden: Tensor, batch: Batch, segment_ids: Tensor) -> dict[str, LossSum]:  # type: ignore[override]
        ahead, behind = hidden.flatten(0, 1).chunk(2, dim=-1)
        real = segment_ids.flatten() > 0
        directions = (
            ("bilm_forward", ahead, self.logits_forward),
            ("bilm_backward", behind, self.logits_backward),
        )
        losses = {}
        for name, rows, tap in directions:
            labels = batch.labels[name].flatten()
            chosen = (real & (labels != IGNORE_LABEL)).nonzero().squeeze(1)
            losses[name] = self.score(rows.index_select(0, chosen), labels.index_select(0, chosen), tap)
        return losses

    def score(self, rows: Tensor, labels: Tensor, tap: nn.Module) -> LossSum:
        """Returns the loss of features (N, H/2) with labels (N,); `tap` sees the logits."""
        return projected_cross_entropy_sum(self.output_layer, rows, labels, tap, fused=self.fused_loss)
