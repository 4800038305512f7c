"""Checks optimizers and schedules against recorded steps and curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tencentpretrain.config.train import OptimConfig
from tencentpretrain.optim.build import build_schedule, set_learning_rate
from tencentpretrain.optim.param_groups import param_groups
from tencentpretrain.parity.base import CaseResult
from tencentpretrain.registry import OPTIMIZERS

_PARAMETER_ATOL = 1e-6
_PARAMETER_RTOL = 1e-5
_RATE_RTOL = 1e-9


def is_optimizer_fixture(content: object) -> bool:
    """Says whether the content of a JSON file is a record of optimizer steps."""
    return isinstance(content, dict) and {"steps", "cases"} <= set(content) and isinstance(content["cases"], dict)


def is_schedule_fixture(content: object) -> bool:
    """Says whether the content of a JSON file is a record of learning-rate curves."""
    cases = content.get("cases") if isinstance(content, dict) else None
    return isinstance(cases, list) and bool(cases) and all(isinstance(c, dict) and "scheduler" in c for c in cases)


def check(path: Path) -> list[CaseResult]:
    """Compares every optimizer and schedule record of a file or folder; one result per case.

    Args:
        path: a record, or a folder of them. The tensors of `<name>.json` are in `<name>.safetensors`.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    results: list[CaseResult] = []
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        if is_optimizer_fixture(content):
            tensors = load_file(file.with_suffix(".safetensors"))
            results += [
                _check_optimizer(name, case, content["steps"], tensors) for name, case in content["cases"].items()
            ]
        elif is_schedule_fixture(content):
            results += [_check_schedule(case) for case in content["cases"]]
    return results


def _check_optimizer(name: str, case: Mapping[str, Any], steps: int, tensors: Mapping[str, Tensor]) -> CaseResult:
    config = OptimConfig(**_known(case["args"]), decay_groups="name")
    excluded = set(case["excluded_parameters"])
    parameters = {
        key.removeprefix("p0/"): nn.Parameter(tensor.clone())
        for key, tensor in tensors.items()
        if key.startswith("p0/") and key.removeprefix("p0/") not in excluded
    }
    groups = param_groups(parameters.items(), config)
    recorded_groups = [(set(group["parameters"]), group["weight_decay"]) for group in case["groups"]]
    ours = [(set(group["names"]), group["weight_decay"]) for group in groups]
    if ours != recorded_groups:
        return CaseResult(name=name, passed=False, deviation=float("inf"), detail="other parameters decay")
    optimizer: torch.optim.Optimizer = OPTIMIZERS.get(config.optimizer)(groups, config)
    learning_rate = build_schedule(config, case["args"]["total_steps"])
    worst, detail = 0.0, ""
    for step in range(1, steps + 1):
        for key, parameter in parameters.items():
            gradient = tensors.get(f"g/{step}/{key}")
            parameter.grad = None if gradient is None else gradient.clone()
        set_learning_rate(optimizer, learning_rate(step - 1))
        optimizer.step()
        for key, parameter in parameters.items():
            expected = tensors[f"{name}/{step}/{key}"]
            difference = (parameter.detach() - expected).abs()
            excess = float((difference - _PARAMETER_ATOL - _PARAMETER_RTOL * expected.abs()).max())
            worst = max(worst, float(difference.max()))
            if not excess <= 0 and not detail:
                detail = f"{key} after step {step} differs by {float(difference.max()):.2e}"
    return CaseResult(name=name, passed=not detail, deviation=worst, detail=detail)


def _known(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key in OptimConfig.model_fields}


def _check_schedule(case: Mapping[str, Any]) -> CaseResult:
    name = f"{case['scheduler']}, {case['total_steps']} steps, warm-up {case['warmup']}"
    decay = {"lr_decay": case["decay"]} if "decay" in case else {}
    config = OptimConfig(
        scheduler=case["scheduler"], warmup=case["warmup"], learning_rate=case["learning_rate"], **decay
    )
    learning_rate = build_schedule(config, case["total_steps"])
    if case.get("error"):
        rates = [learning_rate(update) for update in range(case["total_steps"])]
        bounded = all(0.0 <= rate <= config.learning_rate for rate in rates) and any(rates)
        return CaseResult(
            name=name,
            passed=bounded,
            deviation=0.0,
            detail=f"the record is an error ({case['error'].split(':')[0]}); here defined, rates within [0, base]",
        )
    worst = 0.0
    for update, expected in enumerate(case["lr"]):
        rate = learning_rate(update)
        worst = max(worst, abs(rate - expected) / abs(expected) if expected else abs(rate) / config.learning_rate)
    return CaseResult(name=name, passed=worst <= _RATE_RTOL, deviation=worst)
