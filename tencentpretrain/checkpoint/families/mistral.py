"""Mistral (Jiang et al. 2023, arXiv:2310.06825): LLaMA whose attention may see a window of the last keys only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from tencentpretrain.checkpoint.families.llama import LLAMA, decoder_only
from tencentpretrain.checkpoint.family import Settings
from tencentpretrain.checkpoint.hf_config import HuggingFaceConfig
from tencentpretrain.registry import FAMILIES


def _config(hf_config: Settings, names: Collection[str]) -> dict[str, Any]:
    theirs = HuggingFaceConfig(hf_config, "mistral")
    config = {**decoder_only(theirs), **theirs.sliding_window()}
    theirs.done()
    return config


MISTRAL = FAMILIES.register("mistral")(replace(LLAMA, name="mistral", model_class="MistralForCausalLM", config=_config))
