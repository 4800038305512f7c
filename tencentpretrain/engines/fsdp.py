"""Weights, gradients and optimizer cut over all processes by torch's own sharding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tencentpretrain.checkpoint.layout import Layout
from tencentpretrain.config.train import PrecisionConfig
from tencentpretrain.engines.base import Losses, MicroStep
from tencentpretrain.engines.local import LocalEngine, gradients
from tencentpretrain.engines.processes import Group
from tencentpretrain.layers.blocks import DecoderBlock, EncoderBlock
from tencentpretrain.model import Model
from tencentpretrain.optim.state import restore_optimizer
from tencentpretrain.targets.base import Target


class ShardedLayout(Layout):
    """Each process holds some rows of each tensor."""

    @torch.no_grad()
    def write(self, name: str, tensor: Tensor, values: Tensor) -> None:
        if not isinstance(tensor, DTensor):
            super().write(name, tensor, values)
            return
        whole = values.to(tensor.device, tensor.dtype)
        if whole.shape != tensor.shape:  # the rows that the values do not have stay
            kept = tensor.full_tensor()
            kept[: whole.size(0)].copy_(whole)
            whole = kept
        tensor.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None))

    @torch.no_grad()
    def read(self, name: str, tensor: Tensor) -> Tensor:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.detach().to("cpu", copy=True)


class ShardedEngine(LocalEngine):
    """Fully sharded data parallelism (Zhao et al. 2023, arXiv:2304.11277) by `torch.distributed.fsdp.fully_shard`.

    A block's weights are gathered when it runs and its gradients are summed into shards as soon as they are known.
    """

    holds_parts = True

    def __init__(self, config: PrecisionConfig, group: Group) -> None:
        super().__init__(config)
        self.group = group
        self.rank = self.data_rank = group.rank
        self.world_size = self.data_size = group.size
        self.layout = ShardedLayout()
        self._mesh = init_device_mesh(self.device.type, (group.size,))

    def construct(self, make: Callable[[], Model]) -> Model:
        model = make()
        model.to(self.device)
        policy = MixedPrecisionPolicy()
        for module in model.modules():
            if isinstance(module, (EncoderBlock, DecoderBlock)):
                fully_shard(module, mesh=self._mesh, mp_policy=policy)
        fully_shard(model, mesh=self._mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, Target):
                module.fused_loss = False  # it reads the head's weight, which is whole only while the head runs
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
                module.set_gradient_divide_factor(1.0)  # the loss is divided by the labels of all processes already
        return model

    def accumulate(self, model: nn.Module, steps: Sequence[MicroStep]) -> Losses:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(False)
        losses = list(super().accumulate(model, steps[:-1]))
        model.set_requires_gradient_sync(True)
        return [*losses, *super().accumulate(model, steps[-1:])]

    def gradient_norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        found = gradients(optimizer)
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for gradient in found:
            part = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            square += part.double().square().sum()
        dist.all_reduce(square, group=self.group.device)
        return square.sqrt()

    def sum_numbers(self, numbers: Tensor) -> Tensor:
        return self.group.sum_on_host(numbers)

    def any_rank(self, flag: bool) -> bool:
        return self.group.any(flag)

    def restore_optimizer(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        restore_optimizer(optimizer, tensors)
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
                    state[key] = distribute_tensor(
                        value, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )
