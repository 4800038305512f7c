"""Tensor parallelism: each process holds some heads, some inner columns and some rows of the vocabulary.

Shoeybi et al. 2019 (arXiv:1909.08053, section 3). Cuts are blocks of neighbours in the order of the ranks; a size that
does not divide gives the first ranks one more, so no vocabulary needs padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tencentpretrain.embeddings.word import WordEmbedding
from tencentpretrain.encoders.transformer import TransformerEncoder
from tencentpretrain.errors import ConfigError
from tencentpretrain.layers.attention import Attention
from tencentpretrain.layers.feed_forward import FeedForward, GatedFeedForward
from tencentpretrain.layers.position_bias import RelativePositionBias
from tencentpretrain.layers.rotary import RotaryTable
from tencentpretrain.model import Model
from tencentpretrain.parallel.collectives import enter, leave
from tencentpretrain.parallel.cross_entropy import Vocabulary, split_cross_entropy
from tencentpretrain.parallel.group import Group
from tencentpretrain.targets.base import LossSum
from tencentpretrain.targets.bilm import BilmTarget
from tencentpretrain.targets.lm import LmTarget
from tencentpretrain.targets.mlm import MlmTarget


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The part of a tensor that a process holds: `start` to `stop` along `dim`.

    Fields:
        size: of the whole tensor along `dim`.
        copies: processes of the group that hold this same part: several where key heads are fewer than processes.
    """

    dim: int
    start: int
    stop: int
    size: int
    copies: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """Returns the part of a whole tensor."""
        return whole.narrow(self.dim, self.start, self.stop - self.start)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the part."""
        return (*whole[: self.dim], self.stop - self.start, *whole[self.dim + 1 :])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one process's slice of a model is cut.

    Fields:
        slices: by tensor name; what is not there is whole on every process.
        partial: names of tensors whose gradient is only this process's share and has to be summed over the group:
            norms of single heads, and key heads that several processes hold.
    """

    slices: Mapping[str, Slice]
    partial: frozenset[str]


def block(size: int, rank: int, parts: int) -> tuple[int, int]:
    """Returns the first row and the one after the last of a process's block; earlier ranks take what is left over."""
    each, more = divmod(size, parts)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


def kv_heads(num_kv_heads: int, rank: int, parts: int) -> tuple[int, int, int]:
    """Returns first key head, the one after the last, and how many processes hold the same ones."""
    if num_kv_heads % parts == 0:
        return (*block(num_kv_heads, rank, parts), 1)
    copies = parts // num_kv_heads
    return rank // copies, rank // copies + 1, copies


def make_plan(model: Model, rank: int, parts: int) -> Plan:
    """Returns which part of each tensor a process of the tensor group holds.

    Raises:
        ConfigError: the vocabulary has fewer rows than there are processes.
    """
    slices: dict[str, Slice] = {}
    partial: set[str] = set()
    if parts == 1:
        return Plan(slices=slices, partial=frozenset())
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Attention):
            slices |= _cut_attention(f"{name}.", module, rank, parts)
            for norm in ("q_norm", "k_norm"):
                partial |= {f"{name}.{norm}.{leaf}" for leaf, _ in _leaves(getattr(module, norm))}
        elif isinstance(module, (FeedForward, GatedFeedForward)):
            slices |= _cut_feed_forward(f"{name}.", module, rank, parts)
        elif isinstance(module, RelativePositionBias):
            slices |= _cut_layer(f"{name}.relative_attention_bias.", module.relative_attention_bias, 1, rank, parts)
        elif isinstance(module, WordEmbedding):
            slices |= _cut_layer(f"{name}.embedding.", module.embedding, 0, rank, parts)
        elif isinstance(module, (LmTarget, MlmTarget, BilmTarget)):
            head, layer = _head(module)
            if layer.out_features < parts:
                raise ConfigError(
                    f"tensor_model_parallel_size: {parts} processes cannot share a vocabulary of {layer.out_features}"
                )
            slices |= _cut_layer(f"{name}.{head}.", layer, 0, rank, parts)
    partial |= {name for name, part in slices.items() if part.copies > 1}
    return Plan(slices=slices, partial=frozenset(partial))


def _leaves(module: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
    yield from () if module is None else module.named_parameters(recurse=False)


def _cut_layer(prefix: str, layer: nn.Module, dim: int, rank: int, parts: int) -> dict[str, Slice]:
    """Cuts weight and bias of a layer along the weight's dimension; a bias goes with the rows."""
    cuts: dict[str, Slice] = {}
    for leaf, tensor in _leaves(layer):
        if dim < tensor.dim():
            start, stop = block(tensor.size(dim), rank, parts)
            cuts[prefix + leaf] = Slice(dim=dim, start=start, stop=stop, size=tensor.size(dim))
    return cuts


def _cut_attention(prefix: str, module: Attention, rank: int, parts: int) -> dict[str, Slice]:
    width = module.head_dim
    first, last = block(module.num_heads, rank, parts)
    kv_first, kv_last, copies = kv_heads(module.num_kv_heads, rank, parts)
    heads = ((first, last, module.num_heads, 1), *((kv_first, kv_last, module.num_kv_heads, copies),) * 2)
    cuts: dict[str, Slice] = {}
    for number, (start, stop, size, held) in enumerate(heads):
        part = Slice(dim=0, start=start * width, stop=stop * width, size=size * width, copies=held)
        cuts |= {f"{prefix}linear_layers.{number}.{leaf}": part for leaf, _ in _leaves(module.linear_layers[number])}
    columns = Slice(dim=1, start=first * width, stop=last * width, size=module.num_heads * width)
    return {**cuts, f"{prefix}final_linear.weight": columns}


def _cut_feed_forward(prefix: str, module: FeedForward | GatedFeedForward, rank: int, parts: int) -> dict[str, Slice]:
    cuts = _cut_layer(f"{prefix}linear_1.", module.linear_1, 0, rank, parts)
    if isinstance(module, GatedFeedForward):
        cuts |= _cut_layer(f"{prefix}linear_gate.", module.linear_gate, 0, rank, parts)
    return cuts | _cut_layer(f"{prefix}linear_2.", module.linear_2, 1, rank, parts)


def _head(target: LmTarget | MlmTarget | BilmTarget) -> tuple[str, nn.Linear]:
    return ("linear_2", target.linear_2) if isinstance(target, MlmTarget) else ("output_layer", target.output_layer)


class SplitAttention(Attention):
    """Some of the heads of an attention; what it returns is summed over the processes."""

    group: Group

    def project(self, hidden: Tensor, memory: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        entered = enter(hidden, self.group)
        return super().project(entered, entered if memory is hidden else enter(memory, self.group), rotary)

    def forward(self, *inputs: Any, **settings: Any) -> Tensor:
        with self._own_random_numbers():
            output: Tensor = super().forward(*inputs, **settings)
        return output

    def forward_residual(self, *inputs: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        with self._own_random_numbers():
            return super().forward_residual(*inputs, **settings)

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Lets the heads of each process drop other probabilities, while all go on with the same numbers afterwards."""
        if not self.training or self.dropout == 0:
            yield
            return
        seed = int(torch.randint(1 << 62, (), device="cpu")) + self.group.rank
        weight = self.final_linear.weight
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            yield


class RowLinear(nn.Linear):
    """A linear layer of which each process holds some input columns; the bias is added once."""

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        summed = leave(F.linear(x, self.weight), self.group)
        return summed if self.bias is None else summed + self.bias.to(summed.dtype)


class SplitTable(nn.Embedding):
    """A word table of which each process holds some rows."""

    group: Group
    first: int

    def forward(self, token_ids: Tensor) -> Tensor:
        row = token_ids - self.first
        elsewhere = (row < 0) | (row >= self.weight.size(0))
        vectors = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        return leave(vectors.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.group)


class SplitLmTarget(LmTarget):
    """Language modelling with a head of which each process holds some rows."""

    vocabulary: Vocabulary

    def score(self, rows: Tensor, labels: Tensor) -> LossSum:
        rows = enter(rows * self.scale if self.scale != 1.0 else rows, self.vocabulary.group)
        return split_cross_entropy(
            rows,
            self.output_layer,
            labels,
            self.vocabulary,
            smoothing=self.smoothing,
            ignored_label=self.ignored_label,
        )


class SplitMlmTarget(MlmTarget):
    """Masked language modelling with a head of which each process holds some rows."""

    vocabulary: Vocabulary

    def score(self, rows: Tensor, labels: Tensor) -> LossSum:
        rows = self.layer_norm(self.activation(self.linear_1(rows)))
        return split_cross_entropy(enter(rows, self.vocabulary.group), self.linear_2, labels, self.vocabulary)


class SplitBilmTarget(BilmTarget):
    """Language modelling in both directions with a head of which each process holds some rows."""

    vocabulary: Vocabulary

    def score(self, rows: Tensor, labels: Tensor, tap: nn.Module) -> LossSum:
        return split_cross_entropy(enter(rows, self.vocabulary.group), self.output_layer, labels, self.vocabulary)


_SPLIT_TARGETS = {LmTarget: SplitLmTarget, MlmTarget: SplitMlmTarget, BilmTarget: SplitBilmTarget}


def split_layers(model: Model, plan: Plan, group: Group) -> None:
    """Makes the layers of a model work on their slices; their tensors have been cut as the plan says."""
    if group.size == 1:
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, Attention):
            _become(module, SplitAttention, group=group)
            _become(module.final_linear, RowLinear, group=group)
            module.num_heads //= group.size
            first, last, _ = kv_heads(module.num_kv_heads, group.rank, group.size)
            module.num_kv_heads = last - first
        elif isinstance(module, (FeedForward, GatedFeedForward)):
            module.register_forward_pre_hook(lambda _, inputs: (enter(inputs[0], group), *inputs[1:]))
            _become(module.linear_2, RowLinear, group=group)
        elif isinstance(module, WordEmbedding):
            part = plan.slices[f"{name}.embedding.weight"]
            _become(module.embedding, SplitTable, group=group, first=part.start)
        elif type(module) in _SPLIT_TARGETS:
            head, _ = _head(module)
            part = plan.slices[f"{name}.{head}.weight"]
            vocabulary = Vocabulary(size=part.size, first=part.start, group=group)
            _become(module, _SPLIT_TARGETS[type(module)], vocabulary=vocabulary)
        elif isinstance(module, TransformerEncoder) and module.alibi is not None:
            slopes = module.alibi.slopes
            module.alibi.slopes = slopes[slice(*block(len(slopes), group.rank, group.size))]


def _become(module: nn.Module, kind: type[nn.Module], **values: Any) -> None:
    """Changes a layer's class in place, as `fully_shard` does: names, hooks and ties stay."""
    module.__class__ = kind
    for name, value in values.items():
        setattr(module, name, value)
