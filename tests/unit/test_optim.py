"""Optimizers, parameter groups and schedules against the arithmetic they promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tencentpretrain.config.train import OptimConfig
from tencentpretrain.optim.build import build_optimizer, build_schedule
from tencentpretrain.optim.param_groups import param_groups
from tencentpretrain.registry import OPTIMIZERS, SCHEDULES


def _optimizer(parameters: list[nn.Parameter], decay: float = 0.01, **settings: object) -> torch.optim.Optimizer:
    config = OptimConfig(learning_rate=0.1, **settings)
    return OPTIMIZERS.get(config.optimizer)([{"params": parameters, "weight_decay": decay}], config)


def test_adamw_golden_vector() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = _optimizer([parameter])
    for expected in ([0.683108, 2.313872], [0.257910, 2.736054]):
        parameter.grad = torch.tensor([0.5, -0.25])
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), torch.tensor(expected), atol=1e-6, rtol=0)


def test_adafactor_golden_vector() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    optimizer = _optimizer([parameter], optimizer="adafactor")
    for expected in ([[0.903878, 2.073749], [2.949439, 3.844502]], [[0.807851, 2.147424], [2.898928, 3.689159]]):
        parameter.grad = torch.tensor([[0.5, -0.25], [0.1, 0.2]])
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("corrected", [False, True])
def test_adamw_equals_its_formula_in_float64(corrected: bool) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(37, 5))
    value = parameter.detach().double().clone()
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    optimizer = _optimizer([parameter], decay=0.3, adam_bias_correction=corrected)
    for step in range(1, 30):
        gradient = torch.randn(37, 5)
        parameter.grad = gradient.clone()
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.double().square()
        first_hat = first / (1 - 0.9**step) if corrected else first
        second_hat = second / (1 - 0.999**step) if corrected else second
        value = value - 0.1 * first_hat / (second_hat.sqrt() + 1e-6)
        value = value - 0.1 * 0.3 * value
        torch.testing.assert_close(parameter.detach().double(), value, atol=1e-5, rtol=1e-5)


def test_adamw_with_correction_and_no_decay_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(11)) for _ in range(2))
    optimizers = [
        _optimizer([ours], decay=0.0, adam_bias_correction=True),
        torch.optim.AdamW([theirs], lr=0.1, eps=1e-6, weight_decay=0.0),
    ]
    for _ in range(10):
        gradient = torch.randn(11)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_adafactor_treats_more_dimensions_as_a_stack_of_matrices() -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 4, 5))
    optimizer = _optimizer([stack], decay=0.0, optimizer="adafactor")
    stack.grad = torch.randn(3, 4, 5)
    gradient, before = stack.grad.clone(), stack.detach().clone()
    optimizer.step()
    square = gradient.square()
    row, column = square.mean(2, keepdim=True), square.mean(1, keepdim=True)
    direction = gradient / (row * column / row.mean(1, keepdim=True)).sqrt()
    direction /= max(1.0, float(direction.square().mean().sqrt()))
    torch.testing.assert_close(stack.detach(), before - 0.1 * direction)
    assert optimizer.state[stack]["row"].shape == (3, 4)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_optimizer_learns_and_skips_what_has_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    idle = nn.Parameter(torch.ones(3))
    model.register_parameter("idle", idle)
    inputs = torch.randn(64, 4)
    optimizer = build_optimizer(model, OptimConfig(optimizer=name, learning_rate=0.01))
    losses = []
    for _ in range(60):
        loss = (model(inputs) - inputs[:, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(idle, torch.ones(3))


def test_decay_groups() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7), nn.LayerNorm(4))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    by_dimension = param_groups(model.named_parameters(), OptimConfig())
    assert [group["names"] for group in by_dimension] == [["0.weight"], ["1.bias", "2.weight"]]
    assert [group["weight_decay"] for group in by_dimension] == [0.01, 0.0]
    by_name = param_groups(model.named_parameters(), OptimConfig(decay_groups="name"))
    assert [group["names"] for group in by_name] == [["0.weight", "2.weight"], ["1.bias"]]


GOLDEN = {
    "linear": [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0, 0],
    "cosine": [0, 0.5, 1, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806, 0, 0.03806, 0.14645],
    "cosine_with_restarts": [0, 0.5, 1, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806, 0, 0, 0],
    "polynomial": [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 1e-7, 1e-7, 1e-7],
    "constant": [1] * 13,
    "constant_with_warmup": [0, 0.5, *[1] * 11],
    "inverse_sqrt": [0, 0.5, *[math.sqrt(2 / t) for t in range(2, 11)], 1e-7, 1e-7],
    "tri_stage": [0.01, 0.505, 1, 1, 1, 1, 1, 0.47287, 0.22361, 0.10574, 0.05, 0.05, 0.05],
}


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_schedules(name: str) -> None:
    rate = build_schedule(OptimConfig(scheduler=name, learning_rate=1.0, warmup=0.2, lr_decay=0.4), 10)
    assert [rate(update) for update in range(13)] == pytest.approx(GOLDEN[name], abs=1e-5)


@pytest.mark.parametrize("name", SCHEDULES.names())
@pytest.mark.parametrize("warmup", [0.0, 1.0])
@pytest.mark.parametrize("learning_rate", [0.0, 1e-9, 1e-3])
def test_schedules_are_defined_at_their_ends(name: str, warmup: float, learning_rate: float) -> None:
    rate = build_schedule(OptimConfig(scheduler=name, learning_rate=learning_rate, warmup=warmup), 4)
    assert all(0.0 <= rate(update) <= learning_rate for update in range(8))
