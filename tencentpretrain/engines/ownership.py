"""Which process writes which tensor of a checkpoint."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

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
