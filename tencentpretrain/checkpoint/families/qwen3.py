"""Qwen3 (arXiv:2505.09388): LLaMA with an RMS norm over each query and key head."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from tencentpretrain.checkpoint.families.llama import LLAMA, decoder_only
from tencentpretrain.checkpoint.family import Settings
from tencentpretrain.checkpoint.hf_config import HuggingFaceConfig
from tencentpretrain.checkpoint.rules import Interleave
from tencentpretrain.registry import FAMILIES


def _config(hf_config: Settings, names: Collection[str]) -> dict[str, Any]:
    theirs = HuggingFaceConfig(hf_config, "qwen3")
    theirs.expect("attention_bias", False, default=False)
    config = {**decoder_only(theirs), "qk_norm": True, **theirs.sliding_window()}
    config["attention_head_size"] = theirs.get("head_dim", 128)
    theirs.done()
    return config


QWEN3 = FAMILIES.register("qwen3")(
    replace(
        LLAMA,
        name="qwen3",
        model_class="Qwen3ForCausalLM",
        config=_config,
        words={**LLAMA.words, "h": {"q_norm": "q_norm", "k_norm": "k_norm"}},
        rules=[
            *LLAMA.rules,
            # The norm's weights stand in the order of the rows of a head, which `Interleave` changes.
            Interleave(
                ("encoder.transformer.{i}.self_attn.{h}.weight",),
                "model.layers.{i}.self_attn.{h}.weight",
            ),
        ],
    )
)
