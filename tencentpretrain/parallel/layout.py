"""Whole tensors and the parts of them that the processes of a mesh hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tencentpretrain.checkpoint.layout import Layout
from tencentpretrain.parallel.construct import tied
from tencentpretrain.parallel.mesh import Mesh
from tencentpretrain.parallel.tensor import Plan, Slice


class MeshLayout(Layout):
    """Slices over a tensor group, stages over a pipeline.

    Args:
        mesh: the groups.
        whole: all tensors of the model by published name, on the meta device; tied ones are one object.
        plans: how each rank of the tensor group cuts.
        stages: by name, the stages that hold a tensor.
    """

    def __init__(
        self, mesh: Mesh, whole: Mapping[str, Tensor], plans: Sequence[Plan], stages: Mapping[str, frozenset[int]]
    ) -> None:
        self.mesh = mesh
        self.whole = dict(whole)
        self.plans = plans
        self.stages = stages
        self.tied_to = tied(whole)

    def untie(self, name: str) -> None:
        """Makes a tensor one of its own."""
        self.whole[name] = torch.empty_like(self.whole[name])
        self.tied_to = tied(self.whole)

    def holders(self, name: str) -> frozenset[int]:
        """Returns the stages that hold a tensor under any of its names."""
        first = self.tied_to[name]
        return frozenset().union(*(self.stages[other] for other, key in self.tied_to.items() if key == first))

    def slice(self, name: str, rank: int | None = None) -> Slice | None:
        """Returns which part of a tensor a rank of the tensor group holds, by default this one; None for all of it."""
        return self.plans[self.mesh.tensor.rank if rank is None else rank].slices.get(name)

    def local_names(self, model: nn.Module) -> dict[str, str]:
        """Maps the first name of each tensor this process holds to the name it has in this process's model."""
        return {self.tied_to[name]: name for name, _ in reversed(list(model.named_parameters()))}

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        held = {self.tied_to[name]: tensor for name, tensor in model.state_dict(keep_vars=True).items()}
        return {name: held.get(self.tied_to[name], tensor) for name, tensor in self.whole.items()}

    def shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        return tuple(self.whole[name].shape)

    @torch.no_grad()
    def write(self, name: str, tensor: Tensor, values: Tensor) -> None:
        if tensor.is_meta:
            return
        part = self.slice(name)
        rows = values.size(0) if values.dim() else 0
        if part is None:
            super().write(name, tensor, values)
        elif part.dim == 0:
            last = min(part.stop, rows)
            if last > part.start:
                tensor[: last - part.start].copy_(values[part.start : last])
        else:
            tensor[:rows].copy_(part.of(values))

    @torch.no_grad()
    def read(self, name: str, tensor: Tensor) -> Tensor:
        whole: Tensor | None = None
        source = min(self.holders(name))
        for rank in range(self.mesh.tensor.size):
            if self.mesh.pipeline.rank == source:
                gathered = self.gather(name, tensor, rank)
                whole = gathered if gathered is not None else whole
        if whole is None:
            whole = torch.empty(self.whole[name].shape, dtype=self.whole[name].dtype)
        if self.mesh.pipeline.size > 1:
            dist.broadcast(whole, group=self.mesh.pipeline.host, group_src=source)
        return whole

    def cut(self, name: str, values: Tensor) -> Tensor:
        """Returns this process's part of a tensor or of an optimizer's moment of the same shape."""
        part = self.slice(name)
        if part is None or tuple(values.shape) != tuple(self.whole[name].shape):
            return values
        return part.of(values).contiguous()

    @torch.no_grad()
    def gather(self, name: str, tensor: Tensor, rank: int) -> Tensor | None:
        """Returns, on one rank of the tensor group, a copy of the whole tensor on the CPU; None on the others.

        Takes a parameter or a moment of its shape. Collective over the tensor group.
        """
        group = self.mesh.tensor
        parts = [self.slice(name, other) for other in range(group.size)]
        mine = parts[group.rank]
        shape = tuple(self.whole[name].shape)
        if mine is None or tuple(tensor.shape) != mine.shape(shape):
            return tensor.detach().to("cpu", copy=True) if group.rank == rank else None
        rows = max(part.stop - part.start for part in parts if part is not None)
        padded = tensor.new_zeros((rows, *(size for at, size in enumerate(shape) if at != mine.dim)))
        padded[: mine.stop - mine.start] = tensor.detach().movedim(mine.dim, 0)
        received = [torch.empty_like(padded) for _ in parts] if group.rank == rank else None
        dist.gather(padded, received, group=group.device, group_dst=rank)
        if received is None:
            return None
        whole = torch.empty(shape, dtype=tensor.dtype)
        for part, values in zip(parts, received, strict=True):
            assert part is not None
            part.of(whole).copy_(values[: part.stop - part.start].movedim(0, part.dim))
        return whole
