"""Reading a Hugging Face config: what our model JSON can say about it, and a list of all that it cannot."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tencentpretrain.errors import ConfigError

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_fast",
    "gelu_fast": "gelu_fast",
    "gelu_pytorch_tanh": "gelu_fast",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "linear": "linear",
}
"""Their activation -> ours. Three of theirs are the same tanh formula."""

_ROPE_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_seq_length",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}


class HuggingFaceConfig:
    """Values of their config.json, with the problems met while reading them.

    Args:
        values: the JSON object.
        name: the family, for messages.
    """

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self._values = values
        self._name = name
        self.problems: list[str] = []

    def need(self, key: str) -> Any:
        """Returns a value that every such config has; 1 after noting the problem where it is absent."""
        if self._values.get(key) is None:
            self.problems.append(f"{key}   is missing; a {self._name} config has it")
            return 1
        return self._values[key]

    def get(self, key: str, default: Any) -> Any:
        """Returns a value, or what their class assumes where the key is absent or null."""
        value = self._values.get(key)
        return default if value is None else value

    def expect(self, key: str, *allowed: Any, default: Any) -> None:
        """Notes a problem unless the value is one that our models share."""
        value = self.get(key, default)
        if value not in allowed:
            named = " or ".join(repr(each) for each in allowed)
            self.problems.append(f"{key}   is {value!r}; only {named} can be converted")

    def activation(self, key: str, default: str) -> str:
        """Returns our name of an activation."""
        return self.translate(key, self.get(key, default))

    def translate(self, key: str, activation: str) -> str:
        """Returns our name of an activation that was read from `key`."""
        if activation not in ACTIVATIONS:
            self.problems.append(f"{key}   names {activation!r}; known activations: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS.get(activation, "gelu")

    def rotary(self) -> dict[str, Any]:
        """Returns our rotary settings; theirs are `rope_theta` and `rope_scaling`, or newer `rope_parameters`."""
        rope = {**(self.get("rope_scaling", {})), **(self.get("rope_parameters", {}))}
        theta = rope.pop("rope_theta", self.get("rope_theta", 10000.0))
        old_type = rope.pop("type", "default")
        kind = rope.pop("rope_type", old_type)
        self.expect("partial_rotary_factor", 1, 1.0, default=1.0)
        if rope.pop("partial_rotary_factor", 1.0) != 1.0:
            self.problems.append("partial_rotary_factor   must be 1: all of a head is rotated")
        result: dict[str, Any] = {"rotary_position_embedding": True, "rope_theta": float(theta)}
        if kind == "default":
            return result
        if kind not in ("linear", "dynamic", "llama3", "yarn"):
            self.problems.append(f"rope_scaling   has type {kind!r}; known: linear, dynamic, llama3, yarn")
        scaling: dict[str, Any] = {"type": kind}
        for key, value in rope.items():
            if key in _ROPE_KEYS:
                if value is not None:
                    scaling[_ROPE_KEYS[key]] = value
            elif not (key == "truncate" and value is True) and value is not None:
                self.problems.append(f"rope_scaling.{key}   is {value!r}, which has no counterpart")
        if kind in ("dynamic", "yarn"):
            scaling.setdefault("original_max_seq_length", self.need("max_position_embeddings"))
        result["rope_scaling"] = scaling
        return result

    def sliding_window(self) -> dict[str, Any]:
        """Returns our sliding window, if any; it must be the same in every layer."""
        window = self._values.get("sliding_window")
        if window is None or not self.get("use_sliding_window", True):
            return {}
        kinds = set(self.get("layer_types", []))
        layers, full = self.get("num_hidden_layers", 0), self.get("max_window_layers", 0)
        if not kinds and "use_sliding_window" in self._values and full:
            kinds = {"full_attention"} if full >= layers else {"full_attention", "sliding_attention"}
        if len(kinds) > 1:
            self.problems.append("sliding_window   holds for some layers only; ours holds for all of them")
        return {} if kinds == {"full_attention"} else {"sliding_window": window}

    def done(self) -> None:
        """Raises one error with all problems that were noted.

        Raises:
            ConfigError: something cannot be said in our model JSON.
        """
        if self.problems:
            raise ConfigError(self.problems, source=f"Hugging Face config ({self._name})")


def heads_present(names: Collection[str], heads: Mapping[str, str]) -> list[str]:
    """Returns the targets of ours whose tensors (name start of theirs -> target) a file holds."""
    return [target for start, target in heads.items() if any(name.startswith(start) for name in names)]
