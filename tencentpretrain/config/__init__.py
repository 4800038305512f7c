"""The language of runs: sections of typed settings, JSON files and flags. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tencentpretrain.config.loading import load_config

__all__ = ["load_config"]


def __getattr__(name: str) -> Any:
    if name == "load_config":
        from tencentpretrain.config.loading import load_config

        return load_config
    raise AttributeError(name)
