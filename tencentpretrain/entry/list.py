"""`tencentpretrain list`: the components a config may name."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from tencentpretrain import registry
from tencentpretrain.errors import ConfigError

_REGISTRIES = {
    "embeddings": registry.EMBEDDINGS,
    "encoders": registry.ENCODERS,
    "decoders": registry.DECODERS,
    "targets": registry.TARGETS,
    "tokenizers": registry.TOKENIZERS,
    "processors": registry.PROCESSORS,
    "optimizers": registry.OPTIMIZERS,
    "schedulers": registry.SCHEDULES,
    "tasks": registry.TASKS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the components of all registries, or of those named; --json for a script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(f"usage: tencentpretrain list [{'|'.join(_REGISTRIES)}] [--json]")
        return 0
    kinds = [word for word in arguments if word not in ("--json", "--debug")]
    for kind in kinds:
        if kind not in _REGISTRIES:
            raise ConfigError(f"unknown registry {kind!r}{registry.nearest(kind, _REGISTRIES)}")
    names = {kind: _REGISTRIES[kind].names() for kind in kinds or _REGISTRIES}
    if "--json" in arguments:
        print(json.dumps(names, indent=2))
    else:
        for kind, members in names.items():
            print(f"{kind:<12} {' '.join(members)}")
    return 0
