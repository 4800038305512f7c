"""Whole models against recorded weights, outputs, losses and gradients."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tencentpretrain.checkpoint.loading import load_tensors
from tencentpretrain.config.loading import config_from_values
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.errors import TencentPretrainError
from tencentpretrain.methods.lora import add_lora
from tencentpretrain.model import Model, build_model
from tencentpretrain.parity.base import CaseResult
from tencentpretrain.registry import EMBEDDINGS, ENCODERS, TARGETS
from tencentpretrain.taps import Taps

OUTPUT_ATOL, OUTPUT_RTOL = 2e-5, 1e-4
LOSS_ATOL, LOSS_RTOL = 1e-5, 1e-5
GRADIENT_RTOL = 2e-4
GRADIENT_ATOL_OF_LARGEST = 1e-5

CORRECTIONS: Mapping[str, str] = {
    "bloom": "reference ignores alibi: run without a position bias",
    "cls_max_two_segments": "reference pools to about 9.2e18 where a second segment exists; matching it is not useful, "
    "so only embedding and encoder are compared",
    "bilstm_bilm": "losses are the derived ones; the reference's target raises",
}
"""What is done differently from the record, and why."""


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Reads recorded settings (published spellings) into a model configuration."""
    return config_from_values(settings, source="recorded settings")


def check(path: Path) -> list[CaseResult]:
    """Compares one recorded family.

    Args:
        path: its .json; the .safetensors lies beside it.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    family = path.stem
    if "cases" in record:
        raise ValueError(f"{path} holds units; use parity.units")
    settings = {**record["config"], **record["flags"]}
    absent = missing_parts(settings)
    if absent:
        detail = f"needs parts of the vision/speech line: {', '.join(absent)}"
        return [CaseResult(name=family, passed=False, deviation=float("inf"), detail=detail)]
    tensors = load_file(path.with_suffix(".safetensors"))
    try:
        return list(compare(family, record, settings, tensors))
    except TencentPretrainError as error:
        return [CaseResult(name=family, passed=False, deviation=float("inf"), detail=str(error))]


def missing_parts(settings: Mapping[str, Any]) -> list[str]:
    """Returns the parts of recorded settings that no registry has."""
    absent: set[str] = set()
    for part in (settings, settings.get("stream_0", {}), settings.get("stream_1", {})):
        names = [("embedding", EMBEDDINGS), ("tgt_embedding", EMBEDDINGS), ("target", TARGETS)]
        for key, registry in names:
            absent.update(name for name in part.get(key, ()) if name not in registry.names())
        if part.get("encoder", "transformer") not in ENCODERS.names():
            absent.add(part["encoder"])
    return sorted(absent)


def recorded_model(record: Mapping[str, Any], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Model:
    """Builds the recorded model and loads its weights strictly."""
    config = model_config(settings)
    if config.pooling in ("mean", "last") or config.streams:
        config = config.model_copy(update={"pooling_weighting": "segment"})
    tgt_vocab_size = len(record["tgt_vocab"]) if record["tgt_vocab"] else None
    model = build_model(config, record["vocab_size"], tgt_vocab_size=tgt_vocab_size, initialize=False)
    if settings.get("use_lora"):
        add_lora(model, r=settings["lora_r"], alpha=settings["lora_alpha"])
    weights = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("w/")}
    load_tensors(model, weights)
    return model.eval()


def recorded_batch(record: Mapping[str, Any], tensors: Mapping[str, Tensor], target: tuple[str, ...]) -> Batch:
    """Reads the recorded inputs."""
    inputs = record["inputs"]

    def read(value: Any) -> Any:
        if isinstance(value, str):
            return tensors[value]
        return tuple(read(item) for item in value) if isinstance(value, list) else None

    given = inputs["tgt"]
    labels: dict[str, Tensor] = {}
    if isinstance(given, dict):
        labels = {name: read(value) for name, value in given.items()}
    elif isinstance(given, list):
        labels = {"bilm_forward": tensors[given[0]], "bilm_backward": tensors[given[1]]}
    elif given is not None and target != ("clr",):
        labels = {target[0]: tensors[given]}
    return Batch(
        token_ids=read(inputs["src"]),
        segment_ids=read(inputs["seg"]),
        labels=labels,
        decoder_token_ids=read(inputs["tgt_in"]),
        decoder_segment_ids=read(inputs["tgt_seg"]),
    )


def compare(
    family: str, record: Mapping[str, Any], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[CaseResult]:
    """Yields one result per recorded quantity."""
    model = recorded_model(record, settings, tensors)
    batch = recorded_batch(record, tensors, model.config.target)
    expected = dict(recorded_values(record, tensors))
    only_body = family == "cls_max_two_segments"
    with Taps(model, *expected) as taps:
        output = model(batch)
    note = CORRECTIONS.get(family, "")
    for name, values in expected.items():
        if only_body and name.startswith("logits."):
            continue
        ours = taps[name] if isinstance(taps[name], tuple) else (taps[name],)
        pairs = list(zip(ours, values, strict=True))
        close = all(a.shape == b.shape and torch.allclose(a, b, atol=OUTPUT_ATOL, rtol=OUTPUT_RTOL) for a, b in pairs)
        deviation = max(float((a - b).detach().abs().max()) for a, b in pairs)
        yield CaseResult(name=f"{family}/{name}", passed=close, deviation=deviation, detail=note)
    if only_body:
        return
    yield from compare_losses(family, record, output.losses, note)
    if record["target"]:
        model.zero_grad()
        output.loss.backward()
        yield from compare_gradients(family, record, model, note)


def recorded_values(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yields tap name and recorded tensors."""
    for name, keys in record["outputs"].items():
        if keys is not None:
            yield name, [tensors[key] for key in ([keys] if isinstance(keys, str) else keys)]
    for index, key in enumerate(record["extra"].get("encoder_layers", ())):
        yield f"encoder.layer.{index}", [tensors[key]]
    for name, key in record["extra"].get("logits", {}).items():
        yield f"logits.{name}", [tensors[key]]


def compare_losses(
    family: str, record: Mapping[str, Any], losses: Mapping[str, Any], note: str
) -> Iterator[CaseResult]:
    """Yields one result per loss, count of right answers and count of positions."""
    expected: dict[str, dict[str, float]] = dict(record["target"] or {})
    if "derived" in record:
        derived = record["derived"]
        for side in ("forward", "backward"):
            expected[f"bilm_{side}"] = {
                "loss": derived[f"loss_{side}"],
                "correct": derived[f"correct_{side}"],
                "denominator": derived["positions"],
            }
    if set(expected) != set(losses):
        detail = f"losses are {sorted(losses)}, recorded are {sorted(expected)}"
        yield CaseResult(name=f"{family}/losses", passed=False, deviation=float("inf"), detail=detail)
        return
    for name, values in expected.items():
        loss = losses[name]
        mean = float(loss.mean.detach())
        bound = LOSS_ATOL + LOSS_RTOL * abs(values["loss"])
        deviation = abs(mean - values["loss"])
        yield CaseResult(name=f"{family}/loss.{name}", passed=deviation <= bound, deviation=deviation, detail=note)
        for key, ours in (("correct", loss.correct), ("denominator", loss.count)):
            if key in values:
                deviation = abs(int(ours) - round(values[key]))
                yield CaseResult(name=f"{family}/{key}.{name}", passed=deviation == 0, deviation=deviation, detail=note)
    if "total_loss" in record and record["target"]:
        deviation = abs(sum(float(loss.mean.detach()) for loss in losses.values()) - record["total_loss"])
        bound = LOSS_ATOL + LOSS_RTOL * abs(record["total_loss"])
        yield CaseResult(name=f"{family}/total_loss", passed=deviation <= bound, deviation=deviation, detail=note)


def compare_gradients(family: str, record: Mapping[str, Any], model: Model, note: str) -> Iterator[CaseResult]:
    """Yields one result for gradient norms and one for their inner products with the parameters."""
    named = dict(model.named_parameters(remove_duplicate=False))
    largest = max(norm for norm in record["grad_norm"].values() if norm is not None)
    seen: set[int] = set()
    for kind in ("grad_norm", "grad_dot_weight"):
        worst, wrong = 0.0, []
        for key, expected in record[kind].items():
            if expected is None and key.endswith("encoder.relative_pos_emb.relative_attention_bias.weight"):
                continue  # the reference's unused copy
            own = key.replace("encoder.transformer.0.relative_pos_emb.", "encoder.relative_pos_emb.")
            parameter = named[own]
            seen.add(id(parameter))
            gradient = parameter.grad
            if expected is None or gradient is None:
                if expected is not None or gradient is not None:
                    wrong.append(f"{key}: gradient {'missing' if gradient is None else 'not expected'}")
                continue
            wide = gradient.double()
            ours = float(wide.norm() if kind == "grad_norm" else (wide * parameter.detach().double()).sum())
            bound = GRADIENT_RTOL * abs(expected) + GRADIENT_ATOL_OF_LARGEST * largest
            deviation = abs(ours - expected)
            worst = max(worst, deviation)
            if not deviation <= bound:
                wrong.append(f"{key}: {ours:.6g} instead of {expected:.6g}")
        detail = "; ".join(wrong[:5]) or note
        yield CaseResult(name=f"{family}/{kind}", passed=not wrong, deviation=worst, detail=detail)
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in seen]
    if left:
        detail = f"parameters without a recorded gradient: {', '.join(left[:5])}"
        yield CaseResult(name=f"{family}/parameters", passed=False, deviation=float("inf"), detail=detail)
