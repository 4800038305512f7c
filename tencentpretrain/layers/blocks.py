"""Transformer blocks: attention, feed-forward layer, residual sums and norms in published order and names."""

from __future__ import annotations

from torch import Tensor, nn

from tencentpretrain.layers.attention import Attention
from tencentpretrain.layers.dropout import add_dropout
from tencentpretrain.layers.masks import AttentionMask
from tencentpretrain.layers.rotary import RotaryTable


class TapPoint(nn.Module):
    """Returns its input; a place where `taps.Taps` reads or replaces a value. It has no parameters."""

    def forward(self, value: Tensor) -> Tensor:
        return value


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward layer.

    Args:
        self_attn: the attention.
        feed_forward: the feed-forward layer.
        norms: the norms of both, built.
        dropout: rate on both outputs before the residual sum.
        pre_norm: norm before each sub-layer (Xiong et al. 2020, arXiv:2002.04745, figure 1) instead of after it.
    """

    def __init__(
        self,
        self_attn: Attention,
        feed_forward: nn.Module,
        norms: tuple[nn.Module, nn.Module],
        *,
        dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.feed_forward = feed_forward
        self.layer_norm_1, self.layer_norm_2 = norms
        self.dropout = dropout
        self.pre_norm = pre_norm

    def forward(self, hidden: Tensor, mask: AttentionMask, rotary: RotaryTable | None = None) -> Tensor:
        """Returns (B, S, H) for hidden (B, S, H)."""
        source = self.layer_norm_1(hidden) if self.pre_norm else hidden
        return self._finish(hidden, self.self_attn(source, mask=mask, rotary=rotary))

    def forward_residual(
        self,
        hidden: Tensor,
        previous: Tensor | None,
        additive: Tensor | None,
        bias: Tensor | None = None,
        rotary: RotaryTable | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with scores that pass from layer to layer (`Attention.forward_residual`)."""
        source = self.layer_norm_1(hidden) if self.pre_norm else hidden
        attended, scores = self.self_attn.forward_residual(
            source, previous, additive=additive, bias=bias, rotary=rotary
        )
        return self._finish(hidden, attended), scores

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        summed = add_dropout(hidden, attended, self.dropout, self.training)
        if self.pre_norm:
            return add_dropout(summed, self.feed_forward(self.layer_norm_2(summed)), self.dropout, self.training)
        middle = self.layer_norm_1(summed)
        output: Tensor = self.layer_norm_2(add_dropout(middle, self.feed_forward(middle), self.dropout, self.training))
        return output


class DecoderBlock(nn.Module):
    """Self-attention, attention to the encoder's output, feed-forward layer.

    Args:
        self_attn, context_attn: the attentions.
        feed_forward: the feed-forward layer.
        norms: the norms of the three, built.
        dropout: rate on each output before the residual sum.
        pre_norm: norm before each sub-layer; the encoder's output is then taken as it is.
    """

    def __init__(
        self,
        self_attn: Attention,
        context_attn: Attention,
        feed_forward: nn.Module,
        norms: tuple[nn.Module, nn.Module, nn.Module],
        *,
        dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.context_attn = context_attn
        self.feed_forward = feed_forward
        self.layer_norm_1, self.layer_norm_2, self.layer_norm_3 = norms
        self.dropout = dropout
        self.pre_norm = pre_norm

    def forward(self, hidden: Tensor, memory: Tensor, mask: AttentionMask, memory_mask: AttentionMask) -> Tensor:
        """Returns (B, T, H).

        Shapes:
            hidden: (B, T, H).
            memory: (B, S, H), the encoder's output.
        """
        p, training = self.dropout, self.training
        if self.pre_norm:
            hidden = add_dropout(hidden, self.self_attn(self.layer_norm_1(hidden), mask=mask), p, training)
            attended = self.context_attn(self.layer_norm_2(hidden), memory, mask=memory_mask)
            hidden = add_dropout(hidden, attended, p, training)
            return add_dropout(hidden, self.feed_forward(self.layer_norm_3(hidden)), p, training)
        hidden = self.layer_norm_1(add_dropout(hidden, self.self_attn(hidden, mask=mask), p, training))
        attended = self.context_attn(hidden, memory, mask=memory_mask)
        hidden = self.layer_norm_2(add_dropout(hidden, attended, p, training))
        output: Tensor = self.layer_norm_3(add_dropout(hidden, self.feed_forward(hidden), p, training))
        return output
