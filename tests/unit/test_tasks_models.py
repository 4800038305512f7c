"""Every registered task on every shipped text model: it learns, and its file holds body and head alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tencentpretrain.config.loading import load_config
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import TASKS
from tencentpretrain.tasks.classification import TextClassification
from tencentpretrain.tasks.examples import Examples
from tencentpretrain.tasks.heads import TaskModel
from tencentpretrain.tasks.predict import build_task_model

MODELS = Path(__file__).resolve().parents[2] / "models"
SMALL = {
    "emb_size": 16,
    "hidden_size": 16,
    "feedforward_size": 32,
    "heads_num": 2,
    "layers_num": 2,
    "max_seq_length": 16,
}


class Vocabulary:
    vocab_size, pad_id = 30, 0


def shipped() -> list[str]:
    return sorted(str(path.relative_to(MODELS)) for path in MODELS.glob("*/*config.json"))


def small(name: str) -> ModelConfig | None:
    """The shipped model with small sizes; None where it is of a line that is not here, or has two streams."""
    try:
        config = load_config(MODELS / name)
        if config.streams is not None:
            return None
        overrides = dict(SMALL)
        if config.num_kv_heads is not None:
            overrides["local_kv_heads_num"] = 1
        if config.head_dim is not None:
            overrides["attention_head_size"] = 8
        if config.num_decoder_layers is not None:
            overrides["decoder_layers_num"] = 1
        if config.factorized_embedding:
            overrides["emb_size"] = 8
        return load_config(MODELS / name, **overrides)
    except ConfigError as error:
        if "line, which this version does not have yet" in str(error):
            return None
        raise


@pytest.mark.parametrize("name", shipped())
def test_the_classifier_runs_on_every_shipped_text_model(name: str) -> None:
    config = small(name)
    if config is None:
        pytest.skip("not a text model of one stream")
    task = TextClassification(num_labels=3)
    assert not list(task.problems(config, 8))
    model = build_task_model(task, config, Vocabulary(), seed=1)  # type: ignore[arg-type]
    assert isinstance(model, TaskModel)
    assert {key.split(".")[0] for key in model.state_dict()} == {
        "embedding",
        "encoder",
        "output_layer_1",
        "output_layer_2",
    }
    examples = Examples(
        token_ids=np.array([2, 7, 3, 2, 8, 9, 3, 9, 3], np.uint32),
        offsets=np.array([0, 3, 9]),
        first_lengths=np.array([3, 4]),
        labels={"cls": np.array([0, 2])},
    )
    batch = examples.batch(np.array([0, 1]), pad_id=0)
    loss = task.loss(model(batch), batch)
    assert int(loss.count) == 2
    loss.mean.backward()
    idle = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not idle


def test_train_mode_reaches_body_and_head() -> None:
    config = small("bert/tiny_config.json")
    assert config is not None
    model = build_task_model(TextClassification(num_labels=2), config, Vocabulary())  # type: ignore[arg-type]
    for mode in (False, True):
        model.train(mode)
        assert all(module.training is mode for module in model.modules())
        assert all(part.training is mode for part in model._parts)


@pytest.mark.parametrize("name", TASKS.names())
def test_every_task_says_what_its_command_needs(name: str) -> None:
    task = TASKS.get(name)
    assert task.name == name
    assert task.description
    assert task.example
    assert task.head_prefixes is not None
