"""Which part of a model's tensors a process holds, and how whole values get in and out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Layout:
    """Every process holds every tensor whole. Subclasses cut: by rows, by stage, or into flat parts."""

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the tensors of the whole model by published name; tied ones are one object.

        What this process does not hold is there too, as a tensor on the meta device or a placeholder.
        """
        return dict(model.state_dict(keep_vars=True))

    def shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """Returns the shape of the whole tensor."""
        return tuple(tensor.shape)

    @torch.no_grad()
    def write(self, name: str, tensor: Tensor, values: Tensor) -> None:
        """Stores this process's part of the whole values; fewer rows than the tensor has leave the others as they are.

        All processes call it in the same order.
        """
        tensor[: values.size(0)].copy_(values) if values.dim() and values.shape != tensor.shape else tensor.copy_(
            values
        )

    @torch.no_grad()
    def read(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a copy of the whole tensor on the CPU. All processes call it in the same order."""
        return tensor.detach().to("cpu", copy=True)
