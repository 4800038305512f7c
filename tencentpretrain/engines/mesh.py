"""Models cut over processes: by heads and columns, by layers, and in replicas of such parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tencentpretrain.config.train import PrecisionConfig
from tencentpretrain.engines.base import Losses, MicroStep, Snapshot, Update, Values
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.engines.ownership import owned
from tencentpretrain.engines.reading import detached
from tencentpretrain.engines.reducer import GradientReducer
from tencentpretrain.engines.replicas import ReplicaEngine
from tencentpretrain.errors import CheckpointMismatch
from tencentpretrain.model import Model
from tencentpretrain.optim.state import optimizer_tensors, restore_optimizer
from tencentpretrain.parallel.group import Group
from tencentpretrain.parallel.mesh import Mesh, groups_across
from tencentpretrain.parallel.part import (
    PartModel,
    build_part,
    partial_parameters,
    share_of_norm,
    whole_gradient,
)
from tencentpretrain.parallel.pipeline import Parcel, one_forward_one_backward
from tencentpretrain.targets.base import LossSum


class MeshEngine(ReplicaEngine):
    """Tensor and pipeline parallelism in data-parallel replicas.

    Args:
        mesh: the groups of this process.
        shard_optimizer: split the optimizer over the data group; each process updates its parameters and hands them on
            (ZeRO stage 1, Rajbhandari et al. 2019, arXiv:1910.02054, section 5.1, cut between parameters).
    """

    def __init__(self, config: PrecisionConfig, mesh: Mesh, *, shard_optimizer: bool = False) -> None:
        super().__init__(config, mesh.world)
        self.mesh = mesh
        self.data_rank, self.data_size = mesh.data.rank, mesh.data.size
        self.shard_optimizer = shard_optimizer and mesh.data.size > 1
        self._model: PartModel | None = None
        self._parameters: dict[str, Tensor] = {}
        self._partial: list[tuple[str, Tensor]] = []
        self._tied: list[tuple[Group, list[Tensor]]] = []
        self._loss_names: list[tuple[str, bool]] | None = None
        self._owners: dict[str, int] = {}

    @property
    def model(self) -> PartModel:
        assert self._model is not None, "the model is made by construct"
        return self._model

    def construct(self, make: Callable[[], Model]) -> Model:
        self._model = build_part(make, self.mesh, self.device)
        self.layout = self._model.layout
        return self._model

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        layout = self.model.layout
        optimizer = LocalEngine.prepare(self, model, make_optimizer)
        self._parameters = {
            layout.tied_to[name]: tensor for name, tensor in model.named_parameters() if tensor.requires_grad
        }
        if self.mesh.data.size > 1:
            self._reducer = GradientReducer(list(self._parameters.values()), self.mesh.data)
        partial = {id(parameter) for parameter in partial_parameters(self.model)}
        self._partial = [(name, tensor) for name, tensor in self._parameters.items() if id(tensor) in partial]
        self._tied = self._tied_groups()
        # The first call of an nccl group must be one that all its members make, which batched sends are not.
        self.mesh.pipeline.sum(torch.zeros(1, device=self.device))
        if self.shard_optimizer:
            self._split_optimizer(optimizer)
        return optimizer

    def _tied_groups(self) -> list[tuple[Group, list[Tensor]]]:
        """Returns the tensors that several stages hold, with the group of those stages."""
        layout = self.model.layout
        sets: dict[tuple[int, ...], list[str]] = {}
        for name in dict.fromkeys(layout.tied_to.values()):
            held = tuple(sorted(layout.holders(name)))
            if len(held) > 1:
                sets.setdefault(held, []).append(name)
        found = []
        for held, names in sorted(sets.items()):
            group = groups_across(self.mesh, held)
            if self.mesh.pipeline.rank in held:
                found.append((group, [self._parameters[name] for name in names if name in self._parameters]))
        return found

    def _split_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        names, whole = self.model.layout.tied_to, self.model.layout.whole
        sizes = {name: whole[name].nbytes for name in self._parameters}  # of slices they would differ by process
        for rank in range(self.mesh.data.size):
            mine = owned(sizes, {}, Group(rank=rank, size=self.mesh.data.size))
            self._owners |= dict.fromkeys(mine, rank)
        for group in optimizer.param_groups:
            kept = [
                (name, tensor)
                for name, tensor in zip(group["names"], group["params"], strict=True)
                if self._owners[names[name]] == self.mesh.data.rank
            ]
            group["names"], group["params"] = [name for name, _ in kept], [tensor for _, tensor in kept]

    def accumulate(self, model: nn.Module, steps: Sequence[MicroStep]) -> Losses:
        if self.shard_optimizer:  # which clears only the gradients of its own parameters
            for parameter in self._parameters.values():
                parameter.grad = None
        if self.mesh.pipeline.size > 1:
            return self._accumulate_stage(steps)
        if self.mesh.data.size > 1:
            return super().accumulate(model, steps)
        return LocalEngine.accumulate(self, model, steps)

    def _accumulate_stage(self, steps: Sequence[MicroStep]) -> Losses:
        model, stage = self.model, self.model.stage
        batches = [step.batch.to(self.device, non_blocking=True) for step in steps]
        inputs: dict[int, Parcel] = {}
        shares: dict[int, Tensor] = {}
        losses: list[dict[str, LossSum]] = []

        def forward(number: int, received: Parcel) -> Parcel:
            # Each stage draws its own numbers, equal on all processes that hold slices of it.
            torch.manual_seed((steps[number].seed + stage.number * _SEED_STRIDE) % (1 << 63))
            inputs[number] = received
            with self.autocast():
                sent, output = model.compute(batches[number], received)
            if output is not None:
                divisor = steps[number].divisor
                terms = [loss.total / max(divisor[name], 1) for name, loss in output.losses.items()]
                shares[number] = torch.stack(terms).sum()
                losses.append(detached(output.losses))
            return sent

        def backward(number: int, outputs: Parcel, gradients: Parcel) -> Parcel:
            if self._reducer is not None and number == len(steps) - 1:
                self._reducer.arm()
            if stage.is_last:
                self.backward(shares.pop(number))
            else:
                torch.autograd.backward(outputs, gradients)
            return [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in inputs.pop(number)]

        one_forward_one_backward(model.line, stage, batches, forward, backward)
        return losses if stage.is_last else [{}] * len(steps)

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        losses: Losses,
        *,
        max_norm: float | None,
        inspect: Callable[[Values], None] = lambda values: None,
    ) -> Update:
        result = super().update(optimizer, self._on_all_stages(losses), max_norm=max_norm, inspect=inspect)
        if self.shard_optimizer:
            self._hand_on_updated()
        return result

    def _hand_on_updated(self) -> None:
        group, works = self.mesh.data.device, []
        for name, parameter in self._parameters.items():
            parameter.grad = None
            works.append(dist.broadcast(parameter.detach(), group=group, group_src=self._owners[name], async_op=True))
        for work in works:
            assert work is not None
            work.wait()

    def _on_all_stages(self, losses: Losses) -> Losses:
        """Gives the stages before the last zeros under the names of its losses, to be summed with them."""
        pipeline = self.mesh.pipeline
        if pipeline.size == 1:
            return losses
        if self._loss_names is None:
            told: list[Any] = [None]
            if self.model.stage.is_last:
                told = [[(name, loss.correct is not None) for name, loss in losses[0].items()]]
            dist.broadcast_object_list(told, group=pipeline.host, group_src=pipeline.size - 1)
            self._loss_names = told[0]
        if self.model.stage.is_last:
            return losses
        assert self._loss_names is not None
        zero, none = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.int64, device=self.device)
        empty = {
            name: LossSum(total=zero, count=none, correct=none if counted else None)
            for name, counted in self._loss_names
        }
        return [empty] * len(losses)

    def reduce_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if self._reducer is not None:
            super().reduce_gradients(optimizer)
        for name, parameter in self._partial:
            if parameter.grad is not None:
                parameter.grad = whole_gradient(self.model.layout, name, parameter.grad)
        for group, tensors in self._tied:
            _sum_tied(group, tensors)
        if self._scaler.is_enabled():
            self._spread_overflow()

    def _spread_overflow(self) -> None:
        """Makes a gradient here infinite if one is anywhere, so that all processes skip the same update."""
        found = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        flag = torch.stack([(~gradient.isfinite()).any() for gradient in found]).any().float()
        flag = self.mesh.world.sum(flag)
        for gradient in found:
            gradient.view(-1)[:1].masked_fill_(flag > 0, torch.inf)

    def sum_numbers(self, numbers: Tensor) -> Tensor:
        return self.mesh.pipeline.sum_on_host(self.mesh.data.sum_on_host(numbers))

    def sum_over_ranks(self, counts: Mapping[str, float]) -> dict[str, float]:
        numbers = self.mesh.data.sum_on_host(torch.tensor(list(counts.values()), dtype=torch.float64))
        return dict(zip(counts, numbers.tolist(), strict=True))

    def gradient_norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        layout = self.model.layout
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        held = [(name, tensor.grad) for name, tensor in self._parameters.items() if tensor.grad is not None]
        if held:
            norms = torch.stack([norm.double() for norm in torch._foreach_norm([grad for _, grad in held])])
            shares = torch.tensor([share_of_norm(layout, name) for name, _ in held], dtype=torch.float64)
            total = (norms.square() * shares.to(self.device)).sum()
        return self.mesh.pipeline.sum(self.mesh.tensor.sum(total)).sqrt()

    @torch.no_grad()
    def snapshot(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
        layout = self.model.layout
        held = {layout.tied_to[name]: tensor for name, tensor in layout.tensors(model).items()}
        weights = self._gather_shares(held, {name: name for name in held}, self.mesh.stage)
        twins = {name: first for name, first in layout.tied_to.items() if name != first and first in weights}
        states, parameter_of = {}, {}
        for key, tensor in optimizer_tensors(optimizer).items():
            name, _, what = key.rpartition("/")
            first = layout.tied_to[name]
            states[f"{first}/{what}"], parameter_of[f"{first}/{what}"] = tensor, first
        writers = self.mesh.tensor if self.shard_optimizer else self.mesh.stage
        return Snapshot(
            model={**weights, **{name: weights[first] for name, first in twins.items()}},
            optimizer=self._gather_shares(states, parameter_of, writers),
        )

    def _gather_shares(
        self, tensors: Mapping[str, Tensor], parameter_of: Mapping[str, str], writers: Group
    ) -> dict[str, Tensor]:
        """Returns the whole tensors that this process writes.

        What several stages hold, the first of them writes; what several replicas hold, one of them gathers. Who writes
        follows from the sizes of the whole tensors, which all processes know.
        """
        layout, size = self.model.layout, self.mesh.tensor.size
        names = [name for name in tensors if min(layout.holders(parameter_of[name])) == self.mesh.pipeline.rank]
        sizes = {name: layout.whole[parameter_of[name]].nbytes for name in names}
        mine = {}
        shares = [owned(sizes, {}, Group(rank=writer, size=writers.size)) for writer in range(writers.size)]
        for name in names:
            replica, rank = divmod(next(number for number, share in enumerate(shares) if name in share), size)
            if replica == writers.rank // size:
                whole = layout.gather(parameter_of[name], tensors[name], rank)
                if whole is not None:
                    mine[name] = whole
        return mine

    def restore_optimizer(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        layout = self.model.layout
        held = {layout.tied_to[name]: name for group in optimizer.param_groups for name in group["names"]}
        local = {}
        for key in tensors:
            name, _, what = key.rpartition("/")
            if name not in layout.tied_to:
                raise CheckpointMismatch(
                    f"the checkpoint holds optimizer state of {name}, which the model does not have"
                )
            first = layout.tied_to[name]
            if first in held:
                local[f"{held[first]}/{what}"] = layout.cut(first, tensors[key])
        restore_optimizer(optimizer, local)


_SEED_STRIDE = 0x9E3779B97F4A7C15 >> 1
"""Far apart, so that the stages' seeds do not meet those of other steps."""


def _sum_tied(group: Group, tensors: Sequence[Tensor]) -> None:
    """Sums the gradients of tensors that several stages hold; they stay equal because all sums are."""
    flat = torch.cat(
        [
            (torch.zeros_like(tensor) if tensor.grad is None else tensor.grad).flatten().to(tensor.dtype)
            for tensor in tensors
        ]
    )
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, part in zip(tensors, torch.split(group.sum(flat), sizes), strict=True):
        tensor.grad = part.view_as(tensor)
