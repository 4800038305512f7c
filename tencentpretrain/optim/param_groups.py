"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tencentpretrain.config.train import OptimConfig

OLD_PRETRAIN_NAMES = ("bias", "gamma", "beta", "layer_norm.weight", "layer_norm_1.weight", "layer_norm_2.weight")
"""What a name contained when old pre-training runs left its parameter without decay."""


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    undecayed_names: tuple[str, ...] = OLD_PRETRAIN_NAMES,
) -> list[dict[str, Any]]:
    """Returns the decayed and the undecayed parameters as optimizer groups; frozen ones are left out.

    Args:
        named_parameters: each parameter once, as `model.named_parameters()` yields them.
        config: `decay_groups` chooses the rule: "dimension" leaves one-dimensional tensors (biases, norms, scalars)
            without decay, "name" follows the old list.
        undecayed_names: the old list.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    undecayed: list[tuple[str, nn.Parameter]] = []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        by_name = config.decay_groups == "name"
        exempt = any(part in name for part in undecayed_names) if by_name else parameter.dim() < 2
        (undecayed if exempt else decayed).append((name, parameter))
    groups = [(decayed, config.weight_decay), (undecayed, 0.0)]
    return [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "weight_decay": decay,
        }
        for members, decay in groups
        if members
    ]
