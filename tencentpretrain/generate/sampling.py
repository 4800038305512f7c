"""Continues a text with a decoder-only model, one sampled token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tencentpretrain.data.batch import Batch
from tencentpretrain.errors import ConfigError
from tencentpretrain.model import Model
from tencentpretrain.targets.lm import LmTarget


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Returns logits with -inf outside the `top_k` largest and outside the nucleus of mass `top_p`.

    The nucleus is the smallest prefix of the sorted distribution whose mass exceeds `top_p`, at least one token
    (Holtzman et al. 2020, arXiv:1904.09751, section 3.1). 0 switches either filter off.

    Shapes:
        logits: (..., V).
    """
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p > 0:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass_before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        outside = torch.zeros_like(mass_before, dtype=torch.bool).scatter(-1, order, mass_before > top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


@torch.no_grad()
def sample(
    model: Model,
    prompt: Sequence[int],
    *,
    max_length: int,
    stop_id: int | None = None,
    top_k: int = 70,
    top_p: float = 0.0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Returns the prompt's token ids with sampled ones behind them.

    The whole prefix is read again for each token, by the very forward pass that training uses.

    Args:
        model: a causal model with the lm target; it is left in evaluation mode.
        prompt: token ids, at least one.
        max_length: tokens at the end, prompt included.
        stop_id: generation ends behind this token.
        top_k, top_p: see `filter_logits`.
        temperature: logits are divided by it; 0 takes the likeliest token.

    Raises:
        ConfigError: the model cannot continue text, or the prompt is empty.
    """
    target = model.target.get_submodule("lm") if "lm" in model.target.names else None
    if not isinstance(target, LmTarget) or model.decoder is not None or model.config.mask != "causal":
        raise ConfigError("generating needs a decoder-only model: target lm and mask causal")
    if not prompt:
        raise ConfigError("the prompt is empty; generation needs at least one token to start from")
    model.eval()
    device = next(model.parameters()).device
    token_ids = torch.tensor([list(prompt)], dtype=torch.long, device=device)
    while token_ids.size(1) < max_length:
        batch = Batch(token_ids=token_ids, segment_ids=torch.ones_like(token_ids), has_padding=False)
        hidden, _ = model.features(batch)
        assert isinstance(hidden, Tensor)
        logits = target.predict(hidden[:, -1]).float()
        if temperature == 0:
            chosen = logits.argmax(dim=-1, keepdim=True)
        else:
            filtered = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
            chosen = torch.multinomial(filtered.softmax(dim=-1), 1, generator=generator)
        token_ids = torch.cat([token_ids, chosen], dim=1)
        if stop_id is not None and int(chosen) == stop_id:
            break
    result: list[int] = token_ids[0].tolist()
    return result
