"""Names of parts that configs hold: registered, planned for a later line, or unknown."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import DECODERS, EMBEDDINGS, ENCODERS, PROCESSORS, TARGETS, TOKENIZERS, Registry

_REGISTRIES: Mapping[str, Registry[Any]] = MappingProxyType(
    {registry.kind: registry for registry in (EMBEDDINGS, ENCODERS, DECODERS, TARGETS, TOKENIZERS, PROCESSORS)}
)
_LINES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "embedding": {"patch": "vision", "masked_patch": "vision", "word_patch": "vision", "speech": "speech"},
        "tokenizer": {"image": "vision", "text_image": "vision", "vqgan": "vision", "multimodal": "vision"},
        "data processor": {
            "vit": "vision", "vilt": "vision", "clip": "vision", "beit": "vision", "dalle": "vision", "s2t": "speech",
        },
    }
)  # fmt: skip


def name_problem(kind: str, name: str) -> str | None:
    """Returns what is wrong with a component's name, without importing the component; None if it can be used."""
    registry = _REGISTRIES[kind]
    line = _LINES.get(kind, {}).get(name)
    if line and registry.aliases.get(name, name) not in registry.names():
        return f"{kind} {name!r} belongs to the {line} line, which this version does not have yet"
    try:
        registry.canonical(name)
    except ConfigError as error:
        return str(error)
    return None
