"""Qwen2 and Qwen2.5 (arXiv:2407.10671): LLaMA with biases of query, key and value."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from tencentpretrain.checkpoint.families.llama import LLAMA, decoder_only
from tencentpretrain.checkpoint.family import Settings
from tencentpretrain.checkpoint.hf_config import HuggingFaceConfig
from tencentpretrain.registry import FAMILIES


def _config(hf_config: Settings, names: Collection[str]) -> dict[str, Any]:
    theirs = HuggingFaceConfig(hf_config, "qwen2")
    config = {**decoder_only(theirs), "qkv_bias": True, **theirs.sliding_window()}
    theirs.done()
    return config


QWEN2 = FAMILIES.register("qwen2")(replace(LLAMA, name="qwen2", model_class="Qwen2ForCausalLM", config=_config))
