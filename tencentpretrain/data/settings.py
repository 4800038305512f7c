"""Settings that travel with a store: what `preprocess.py` was told is the default of `pretrain.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.store import Header

CARRIED = (
    "data_processor",
    "seq_length",
    "tgt_seq_length",
    "dup_factor",
    "short_seq_prob",
    "docs_buffer_size",
    "full_sentences",
    "dynamic_masking",
    "whole_word_masking",
    "span_masking",
    "span_geo_prob",
    "span_max_length",
    "sentence_selection_strategy",
    "text_infilling",
    "keep_blank_lines",
)
"""Fields of DataConfig that old command lines give to `preprocess.py`."""


def carried_settings(data: DataConfig, given: Callable[[str], bool]) -> dict[str, Any]:
    """Returns the settings that were given and that a store carries."""
    return {name: getattr(data, name) for name in CARRIED if name == "data_processor" or given(name)}


def with_store_settings(data: DataConfig, header: Header, given: Callable[[str], bool]) -> DataConfig:
    """Returns `data` with the store's settings in place of those that were not given.

    Args:
        given: whether a setting was given by a flag or a config file.
    """
    carried = {name: value for name, value in header.settings.items() if name in CARRIED and not given(name)}
    return DataConfig.model_validate({**data.model_dump(), **carried})
