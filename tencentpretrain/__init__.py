"""Modular pre-training: a model is five parts, named in a small JSON file."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tencentpretrain.checkpoint.loading import load_checkpoint
    from tencentpretrain.config.loading import load_config
    from tencentpretrain.model import build_model

__all__ = ["build_model", "load_checkpoint", "load_config"]

# Imported when first used, so that `--help` does not wait for torch.
_HOMES = {
    "load_config": "tencentpretrain.config.loading",
    "build_model": "tencentpretrain.model",
    "load_checkpoint": "tencentpretrain.checkpoint.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tencentpretrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
