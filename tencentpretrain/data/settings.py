"""Settings that travel with a store: what `preprocess.py` was told is the default of `pretrain.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tencentpretrain.config.data import CARRIED, DataConfig
from tencentpretrain.data.legacy import LegacyDataset
from tencentpretrain.data.samples import Dataset


def carried_settings(data: DataConfig, given: Callable[[str], bool]) -> dict[str, Any]:
    """Returns the settings that were given and that a store carries."""
    return {name: getattr(data, name) for name in CARRIED if name == "data_processor" or given(name)}


def with_store_settings(data: DataConfig, dataset: Dataset, given: Callable[[str], bool]) -> DataConfig:
    """Returns `data` with the data set's settings in place of those that were not given.

    The lengths of an old `dataset.pt` are fixed, whatever was given.

    Args:
        given: whether a setting was given by a flag or a config file.
    """
    fixed = isinstance(dataset, LegacyDataset)
    carried = {
        name: value for name, value in dataset.settings.items() if name in CARRIED and (fixed or not given(name))
    }
    return DataConfig.model_validate({**data.model_dump(), **carried})
