"""Single building blocks against recorded inputs and outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.embeddings.sinusoidalpos import SinusoidalPositions
from tencentpretrain.layers.activations import ACTIVATIONS
from tencentpretrain.layers.attention import Attention
from tencentpretrain.layers.masks import HIDDEN_SCORE, AttentionMask, additive_mask
from tencentpretrain.layers.norm import build_norm
from tencentpretrain.layers.pooling import pool
from tencentpretrain.layers.position_bias import alibi_index, alibi_slopes, relative_bucket
from tencentpretrain.layers.rotary import RotaryPositions, rotate
from tencentpretrain.parity.base import CaseResult
from tencentpretrain.targets.lm import LmTarget

TOLERANCE = 1e-5

Outputs = dict[str, Tensor]


class NotCheckableError(Exception):
    """The record describes something this package does not do, or not in that form."""


def check(path: Path) -> list[CaseResult]:
    """Compares every recorded building block.

    Args:
        path: the record's .json; the .safetensors lies beside it.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    tensors = load_file(path.with_suffix(".safetensors"))
    return [_check_case(index, case, tensors) for index, case in enumerate(record["cases"])]


def _check_case(index: int, case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CaseResult:
    params = ", ".join(f"{key} {value}" for key, value in case["params"].items() if value is not None)
    name = f"units/{index} {case['kind']} ({params})"
    inputs = {key: tensors[place] for key, place in case["inputs"].items()}
    try:
        with torch.no_grad():
            ours = RUNNERS.get(case["kind"], _not_checkable)(case["params"], inputs)
    except NotCheckableError as reason:
        return CaseResult(name=name, passed=False, deviation=float("inf"), detail=f"not checkable: {reason}")
    worst, passed, detail = 0.0, True, ""
    for key, place in case["outputs"].items():
        expected, got = tensors[place], ours[key]
        if case["kind"] == "pooling" and case["params"]["name"] == "max":
            one_segment = (inputs["seg"] < 2).all(dim=1)
            expected, got = expected[one_segment], got[one_segment]
            detail = "rows with a second segment left out: the reference is about 9.2e18 there"
        if expected.shape != got.shape:
            detail = f"{key} has shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
            return CaseResult(name=name, passed=False, deviation=float("inf"), detail=detail)
        worst = max(worst, float((got.double() - expected.double()).abs().max()))
        passed = passed and torch.allclose(got.double(), expected.double(), atol=TOLERANCE, rtol=TOLERANCE)
    return CaseResult(name=name, passed=passed, deviation=worst, detail=detail)


def _not_checkable(params: Mapping[str, Any], inputs: Outputs) -> Outputs:
    raise NotCheckableError("needs parts of the vision/speech line")


def _load(module: nn.Module, inputs: Outputs) -> nn.Module:
    module.load_state_dict({key[2:]: tensor for key, tensor in inputs.items() if key.startswith("w.")}, strict=True)
    return module.eval()


def _activation(params: Mapping[str, Any], inputs: Outputs) -> Outputs:
    return {"y": ACTIVATIONS[params["name"]](inputs["x"])}


def _layernorm(params: Mapping[str, Any], inputs: Outputs) -> Outputs:
    size = inputs["x"].size(-1)
    if params.get("eps_inside"):
        # gamma (x - mean) / sqrt(unbiased variance + eps) + beta is the standard norm, gamma and eps rescaled.
        shrink = math.sqrt((size - 1) / size)
        rescaled = {**inputs, "w.gamma": inputs["w.gamma"] * shrink}
        return {
            "y": _load(build_norm(params["name"], size, shrink**2 * params["eps"], "standard"), rescaled)(inputs["x"])
        }
    return {"y": _load(build_norm(params["name"], size, params["eps"], "toolkit"), inputs)(inputs["x"])}


def _pooling(params: Mapping[str, Any], inputs: Outputs) -> Outputs:
    return {"y": pool(inputs["memory_bank"], inputs["seg"], params["name"], "segment")}


def _bucket(params: Mapping[str, Any], inputs: Outputs) -> Outputs:
    return {"bucket": relative_bucket(inputs["relative_position"].long(), **params)}


def _sinusoid(params: Mapping[str, Any], inputs: Outputs) -> Outputs:
    speech = params["speech_in_embedding"]
    config = ModelConfig(
        emb_size=params["emb_size"],
        max_seq_length=params["max_seq_length"],
        max_audio_frames=params["max_audio_frames"],
        embedding=("speech", "sinusoidalpos") if speech else ("word", "sinusoidalpos"),
    )
    module = SinusoidalPositions(config, 0, pad_id=params["pad_id"])
    rows = max(params["max_seq_length"], params["max_audio_frames"]) if speech else params["max_seq_length"]
    table = module.table(rows, inputs["seg"].device)[:rows]
    y = module(inputs["seg"], inputs["seg"])
    return {"table": table, "y": y}


def _rotary(params: Mapping[str, Any], inputs: Outputs) -> Outputs:
    table = RotaryPositions(params["head_dim"], theta=params["theta"])(params["end"], inputs["query"].device)
    length = inputs["query"].size(1)
    part = (table[0][:length], table[1][:length])
    query, key = (rotate(inputs[name].transpose(1, 2), part) for name in ("query", "key"))
    return {"cos": table[0], "sin": table[1], "query": query, "key": key}


def _alibi(params: Mapping[str, Any], inputs: Outputs) -> Outputs:
    mask = inputs["attention_mask"]
    bias = alibi_slopes(params["heads_num"])[None, :, None] * alibi_index(mask)[:, None, :]
    return {"alibi": bias.reshape(-1, 1, mask.size(1))}


def _attention(params: Mapping[str, Any], inputs: Outputs) -> Outputs:
    num_heads, head_dim = params["heads_num"], params["attention_head_size"]
    scale = head_dim**-0.5 if params["with_scale"] else 1.0
    module = Attention(
        params["hidden_size"],
        num_heads,
        head_dim=head_dim,
        num_kv_heads=params["local_kv_heads_num"],
        bias=params["has_bias"],
        qkv_bias=params["has_bias"],
        scale=scale,
    )
    _load(module, inputs)
    x, additive = inputs["x"], inputs["mask"]
    rotary = RotaryPositions(head_dim)(x.size(1), x.device) if params["rotary"] else None
    bias = inputs["position_bias"] * scale if "position_bias" in inputs else None
    if "alibi" in inputs:
        slope_bias = inputs["alibi"].view(-1, num_heads, 1, x.size(1))
        bias = slope_bias if bias is None else bias + slope_bias
    if params["has_residual_attention"]:
        y, scores = module.forward_residual(x, inputs.get("prev_attn"), additive=additive, bias=bias, rotary=rotary)
        return {"y": y, "attn_out": scores}
    visible = additive > HIDDEN_SCORE / 2
    mask = visible if bias is None else torch.where(visible, bias, float("-inf"))
    return {"y": module(x, mask=AttentionMask(mask=mask), rotary=rotary)}


def _encoder_mask(params: Mapping[str, Any], inputs: Outputs) -> Outputs:
    segment_ids = inputs["seg"]
    mask = additive_mask(params["mask"], segment_ids)
    if mask is None:
        raise NotCheckableError("the rule gave no mask")
    length = segment_ids.size(1)
    return {"mask": mask.expand(segment_ids.size(0), 1, length, length)}


def _lm_target(params: Mapping[str, Any], inputs: Outputs) -> Outputs:
    config = ModelConfig(
        hidden_size=params["hidden_size"],
        lm_bias=True,
        label_smoothing=params["label_smoothing"],
        ignore_index=params["ignore_index"],
        prefix_lm_loss=params["prefix_lm_loss"],
    )
    target = LmTarget(config, params["vocab_size"], pad_id=params["pad_id"])
    _load(target, inputs)
    batch = Batch(token_ids=inputs["tgt"], segment_ids=inputs["seg"], labels={"lm": inputs["tgt"]})
    return {"loss": target(inputs["memory_bank"], batch, inputs["seg"])["lm"].mean}


RUNNERS: Mapping[str, Callable[[Mapping[str, Any], Outputs], Outputs]] = {
    "activation": _activation,
    "layernorm": _layernorm,
    "pooling": _pooling,
    "relative_position_bucket": _bucket,
    "sinusoidalpos": _sinusoid,
    "rotary": _rotary,
    "alibi": _alibi,
    "attention": _attention,
    "encoder_mask": _encoder_mask,
    "lm_target": _lm_target,
}
"""By kind of unit, what computes its outputs."""
