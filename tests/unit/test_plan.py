"""A plan against the model it is about: names and shapes, saved tensors, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tencentpretrain.config import load_config
from tencentpretrain.config.train import LoraConfig
from tencentpretrain.errors import ConfigError
from tencentpretrain.methods.lora import add_lora, mark_only_lora_trainable
from tencentpretrain.model import Model
from tencentpretrain.plan.parameters import weights_of

MODELS = Path(__file__).resolve().parents[2] / "models"


def plannable() -> list[str]:
    names = []
    for path in sorted(MODELS.rglob("*_config.json")) + sorted(MODELS.rglob("config.json")):
        try:
            config = load_config(path)
        except ConfigError:
            continue
        if not list(config.problems()):
            names.append(str(path.relative_to(MODELS)))
    return names


@pytest.mark.parametrize("name", plannable())
def test_parameters_are_those_of_the_built_model(name: str) -> None:
    config = load_config(MODELS / name)
    if config.streams is not None:  # the files of two-stream models are for fine-tuning; this is their own target
        config = config.model_copy(update={"target": ("clr",)})
    with torch.device("meta"):
        model = Model(config, 1000)
    expected = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    assert {weight.name: weight.shape for weight in weights_of(config, 1000)} == expected


@pytest.mark.parametrize("name", ["bert/tiny_config.json", "t5-v1_1/small_config.json", "llama3/3.2-1b_config.json"])
def test_adapters_are_those_of_the_built_model(name: str) -> None:
    config, lora = load_config(MODELS / name), LoraConfig(use_lora=True, lora_r=4)
    with torch.device("meta"):
        model = Model(config, 1000)
        add_lora(model, r=4, alpha=8)
    mark_only_lora_trainable(model)
    expected = {key: (tuple(value.shape), value.requires_grad) for key, value in model.named_parameters()}
    assert {weight.name: (weight.shape, weight.trained) for weight in weights_of(config, 1000, lora=lora)} == expected
