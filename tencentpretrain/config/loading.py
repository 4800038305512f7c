"""Reads a model config without a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tencentpretrain.config.decode import Origin, Values, decode, read_file_values
from tencentpretrain.config.json_file import read_json
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.options import Part, options_by_spelling, show
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import nearest

_MODEL = Part(name="model", section=ModelConfig)


def load_config(path: str | Path, **overrides: Any) -> ModelConfig:
    """Reads a model from a JSON file in published or inside spellings.

    Keys of other sections (`learning_rate`, `data_processor`) may stand in the file and are left aside.

    Args:
        path: a file; a relative path is also looked up below the shipped models.
        overrides: values that replace the file's, under either spelling.

    Raises:
        ConfigError: lists every problem, each with its line.
    """
    file = read_json(path)
    return config_from_values(file.values, source=str(path), overrides=overrides, file_lines=file)


def config_from_values(
    given: Any, *, source: str = "config", overrides: dict[str, Any] | None = None, file_lines: Any = None
) -> ModelConfig:
    """Builds a model's settings from a mapping as a JSON file holds it.

    Raises:
        ConfigError: lists every problem.
    """
    from tencentpretrain.config.json_file import JsonFile

    options = options_by_spelling([_MODEL])
    values = Values()
    read_file_values(values, file_lines or JsonFile(path=Path(source), values=given), options, strict=True)
    for name, value in (overrides or {}).items():
        if name not in options:
            values.problems.append(f"{name}: unknown setting, given as {show(value)}{nearest(name, options)}")
            continue
        values.put(options[name], name, value, Origin(source="flag", place=name))
    section, sound = decode(_MODEL, values)
    assert isinstance(section, ModelConfig)
    if sound:
        for sentence in section.problems():
            values.add(sentence)
    if values.problems:
        raise ConfigError(values.problems, source=source)
    return section
