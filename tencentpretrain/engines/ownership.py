"""Which process writes which tensor of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

from torch import Tensor

from tencentpretrain.engines.processes import Group


def owned(sizes: Mapping[str, int], same: Mapping[str, Hashable], group: Group) -> set[str]:
    """Returns the names that this process of the group writes: each tensor goes to the process with the least so far.

    Args:
        sizes: bytes by name, equal and in the same order on all processes.
        same: names with equal values are one tensor and stay together.
    """
    loads = [0] * group.size
    owner: dict[Hashable, int] = {}
    mine = set()
    for name, size in sizes.items():
        key = same.get(name, name)
        if key not in owner:
            owner[key] = min(range(group.size), key=loads.__getitem__)
            loads[owner[key]] += size
        if owner[key] == group.rank:
            mine.add(name)
    return mine


def collect(
    tensors: Mapping[str, Tensor], group: Group, read: Callable[[str, Tensor], Tensor], *, together: bool
) -> dict[str, Tensor]:
    """Returns whole copies of the tensors that this process writes, read one after the other.

    Args:
        tensors: equal names in the same order on all processes of the group; tied ones are one object.
        read: returns a whole copy of a tensor on the CPU.
        together: whether all processes must call `read` together, since each holds a part.
    """
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    mine = owned(sizes, {name: id(tensor) for name, tensor in tensors.items()}, group)
    wholes: dict[int, Tensor | None] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in wholes:
            whole = read(name, tensor) if together or name in mine else None
            wholes[id(tensor)] = whole if name in mine else None
    return {name: whole for name, tensor in tensors.items() if (whole := wholes[id(tensor)]) is not None}
