"""Writes a run's settings in published spellings, so that a saved file can be given as --config_path again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tencentpretrain.config import dialect
from tencentpretrain.config.base import Section
from tencentpretrain.config.cli import Parsed, part_of
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.options import Part, options_of

if TYPE_CHECKING:
    from tencentpretrain.config.run import RunConfig

_PATHS_OF_THE_MODEL = ("vocab_path", "merges_path", "spm_model_path")


def to_published(run: RunConfig | Parsed, *, run_paths: bool = False) -> dict[str, Any]:
    """Returns the effective settings of a run as one flat object.

    Args:
        run_paths: also the files that belong to this run alone (`output_model_path`, `train_path` ...); without them
            the result describes the model and how it was trained, and can be given to another command.
    """
    if isinstance(run, Parsed):
        found = [(part, run.sections[part.name]) for part in run.parts if part.name != "file"]
    else:
        from tencentpretrain.config.run import PRETRAIN_PARTS

        found = [(part, getattr(run, part.name)) for part in map(part_of, PRETRAIN_PARTS)]
    result: dict[str, Any] = {}
    for part, section in found:
        if section is not None:
            result |= _section(part, section)
    if run_paths:
        return result
    return {key: value for key, value in result.items() if not key.endswith("_path") or _of_model(key)}


def model_to_published(model: ModelConfig) -> dict[str, Any]:
    """Returns a model's settings as a config file holds them."""
    return _section(Part(name="model", section=ModelConfig), model)


def _of_model(key: str) -> bool:
    return key.removeprefix("tgt_") in _PATHS_OF_THE_MODEL


def _section(part: Part, section: Section) -> dict[str, Any]:
    values = section.model_dump(mode="json", warnings=False)
    result = {}
    for option in options_of(part):
        value = option.outside(values[option.field])
        if value is not None or option.default is not None:
            result[option.key] = value
    if isinstance(section, ModelConfig) and section.streams is not None:
        for name, stream in zip(dialect.STREAMS, section.streams, strict=True):
            own = _section(part, stream)
            result[name] = {key: value for key, value in own.items() if result.get(key) != value}
    return result


def keys_of(parts: Iterable[Part]) -> Mapping[str, Part]:
    """Maps each published key to the section that owns it."""
    return {option.key: part for part in reversed(list(parts)) for option in options_of(part)}
