"""Recurrent encoders. None of them masks padding: it runs through the recurrence like any token."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.encoders.base import Encoder
from tencentpretrain.errors import ConfigError
from tencentpretrain.layers.build import required
from tencentpretrain.layers.dropout import Dropout
from tencentpretrain.registry import ENCODERS


def build_recurrence(
    kind: type[nn.RNN] | type[nn.LSTM] | type[nn.GRU], config: ModelConfig, width: int, bidirectional: bool
) -> nn.RNNBase:
    """Returns a batch-first recurrent module with the configured number of layers."""
    num_layers = required(config.num_layers, "layers_num", "a recurrent encoder")
    return kind(
        required(config.emb_size, "emb_size", "a recurrent encoder"),
        width,
        num_layers,
        batch_first=True,
        dropout=config.dropout if num_layers > 1 else 0.0,
        bidirectional=bidirectional,
    )


def half_width(config: ModelConfig) -> int:
    """Returns the width of one direction.

    Raises:
        ConfigError: the hidden size is odd.
    """
    hidden_size = required(config.hidden_size, "hidden_size", "a recurrent encoder")
    if hidden_size % 2:
        raise ConfigError(f"hidden_size {hidden_size} must be even for an encoder that reads in both directions")
    return hidden_size // 2


class RecurrentEncoder(Encoder):
    """A recurrent stack; with `bidirectional`, both directions of half width joined at every layer."""

    kind: ClassVar[type[nn.RNN] | type[nn.LSTM] | type[nn.GRU]]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = (
            half_width(config)
            if config.bidirectional
            else required(config.hidden_size, "hidden_size", "a recurrent encoder")
        )
        self.rnn = build_recurrence(self.kind, config, width, config.bidirectional)
        self.dropout = Dropout(config.dropout)

    def forward(self, emb: Tensor, segment_ids: Tensor, has_padding: bool = True) -> Tensor:  # type: ignore[override]
        hidden: Tensor = self.dropout(self.rnn(emb)[0])
        return hidden


class TwoWayEncoder(Encoder):
    """Two independent stacks of half width, one of which reads backward (ELMo, Peters et al. 2018, arXiv:1802.05365).

    The backward stack starts at the end of the padded axis, so it reads padding first.
    """

    kind: ClassVar[type[nn.RNN] | type[nn.LSTM] | type[nn.GRU]]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = half_width(config)
        self.rnn_forward = build_recurrence(self.kind, config, width, False)
        self.rnn_backward = build_recurrence(self.kind, config, width, False)
        self.dropout = Dropout(config.dropout)

    def forward(self, emb: Tensor, segment_ids: Tensor, has_padding: bool = True) -> Tensor:  # type: ignore[override]
        ahead = self.dropout(self.rnn_forward(emb)[0])
        behind = self.dropout(self.rnn_backward(emb.flip(1))[0]).flip(1)
        return torch.cat((ahead, behind), dim=-1)


@ENCODERS.register("rnn")
class RnnEncoder(RecurrentEncoder):
    """Elman recurrence with tanh."""

    kind = nn.RNN


@ENCODERS.register("lstm")
class LstmEncoder(RecurrentEncoder):
    """Long short-term memory (Hochreiter and Schmidhuber 1997)."""

    kind = nn.LSTM


@ENCODERS.register("gru")
class GruEncoder(RecurrentEncoder):
    """Gated recurrent units (Cho et al. 2014, arXiv:1406.1078)."""

    kind = nn.GRU


@ENCODERS.register("birnn")
class TwoWayRnnEncoder(TwoWayEncoder):
    """Two independent tanh recurrences."""

    kind = nn.RNN


@ENCODERS.register("bilstm")
class TwoWayLstmEncoder(TwoWayEncoder):
    """Two independent LSTM stacks."""

    kind = nn.LSTM


@ENCODERS.register("bigru")
class TwoWayGruEncoder(TwoWayEncoder):
    """Two independent GRU stacks."""

    kind = nn.GRU
