"""Reads a config file: JSON with line numbers, and a sentence for every file that is not one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tencentpretrain.config.paths import find_file
from tencentpretrain.errors import ConfigError
from tencentpretrain.sniff import describe_file

KeyPath = tuple[str, ...]
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]')
_COLON = re.compile(r"\s*:")


@dataclass(frozen=True, kw_only=True)
class JsonFile:
    """The object in a JSON file and where its keys stand.

    `lines` maps a key, with the keys around it, to its line (counted from 1). `problems` are keys that stand twice.
    """

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_json(
    path: str | Path,
    *,
    explain: Callable[[Mapping[str, Any]], str | None] | None = None,
    ask: str | None = None,
) -> JsonFile:
    """Reads a config, by default a model's.

    Args:
        explain: says what an object is that is not such a config; None if it is one.
        ask: what the flag takes, for messages.

    Raises:
        ConfigError: the file is missing, cannot be read, is no JSON object, or is another kind of file.
    """
    found = find_file(path)
    text = _read_text(path, found, ask or _ASK)
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a usable JSON file: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f'{path}: holds a JSON {_kind(values)}, but a config is an object: {{"key": value, ...}}')
    foreign = (explain or explain_content)(values)
    if foreign:
        raise ConfigError(f"{path}: {foreign}")
    lines, twice = _locate(text)
    problems = tuple(f"{'.'.join(key)}: stands twice, in lines {first} and {second}" for key, first, second in twice)
    return JsonFile(path=Path(path), values=values, lines=lines, problems=problems)


def _read_text(path: str | Path, found: Path, ask: str) -> str:
    try:
        description = describe_file(found)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no such config file (looked in {Path.cwd()} and among the shipped models)"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: the config file cannot be read: {error.strerror or error}") from None
    if description and not _is_json_kind(description):
        raise ConfigError(f"{path}: this is {description}, not a config; {_FLAG_FOR_FILE.get(description, ask)}")
    try:
        return found.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the config file cannot be read: {error}") from None


_ASK = "--config_path takes a model's JSON file, such as models/bert/base_config.json"
_WEIGHTS = "weights belong to --pretrained_model_path (training) or --load_model_path (inference)"
_FLAG_FOR_FILE = {
    "a PyTorch checkpoint": _WEIGHTS,
    "a safetensors file": _WEIGHTS,
    "a pickle file": _WEIGHTS,
    "a SentencePiece model": "it belongs to --spm_model_path",
    "a directory": "give the JSON file inside it; a directory of weights belongs to --pretrained_model_path",
}


def _is_json_kind(description: str) -> bool:
    """Whether the description is of JSON content, which `explain_content` explains better."""
    return description.startswith(("a Hugging Face", "the index of", "a DeepSpeed", "a JSON vocabulary"))


def explain_content(values: Mapping[str, Any]) -> str | None:
    """Says what a JSON object is if it is not a model config, and where it belongs."""
    keys = set(values)
    folder = "its folder belongs to --vocab_path with --tokenizer hfpretrained"
    if "model" in keys and keys & {"added_tokens", "pre_tokenizer", "normalizer"}:
        return f"this is a Hugging Face tokenizer.json; {folder}"
    if "weight_map" in keys:
        return "this is the index of a sharded checkpoint; its folder belongs to --pretrained_model_path"
    if "tokenizer_class" in keys or {"model_max_length", "clean_up_tokenization_spaces"} <= keys:
        return f"this is a Hugging Face tokenizer_config.json; {folder}"
    if keys & {
        "zero_optimization",
        "train_micro_batch_size_per_gpu",
        "train_batch_size",
        "zero_allow_untested_optimizer",
    }:
        return "this is a DeepSpeed config; it belongs to --deepspeed_config"
    if "peft_type" in keys:
        return "this is a PEFT adapter config; adapters are set with --use_lora, --lora_r and --lora_alpha"
    if keys & {"architectures", "transformers_version", "model_type", "diffusers_version"}:
        name = next(iter(values.get("architectures") or []), None) or values.get("model_type") or "unknown model"
        return (
            f"this is a Hugging Face config ({name}), not one of ours: its keys mean other things; "
            "take the matching file below models/, such as models/bert/base_config.json, and convert the weights"
        )
    if keys & {"pad_token", "unk_token", "cls_token", "sep_token"}:
        return "this is a map of special tokens; it belongs to --special_tokens_map"
    if len(keys) > 100 and all(isinstance(value, int) for value in values.values()):
        return "this is a JSON vocabulary; --vocab_path takes a text file with one token per line"
    if (
        keys
        and all(isinstance(value, int) and not isinstance(value, bool) for value in values.values())
        and (sorted(values.values()) == list(range(len(values))))
    ):
        return "this is a map from labels to numbers; it belongs to --label2id_path"
    if {"global_step", "files"} <= keys or {"format_version", "fingerprint"} <= keys:
        return "this is a manifest of saved files, not a config"
    return None


def _kind(value: Any) -> str:
    return {list: "list", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON knows")


def _locate(text: str) -> tuple[dict[KeyPath, int], list[tuple[KeyPath, int, int]]]:
    """Returns the line of each key, and the keys that stand twice in one object with both lines."""
    lines: dict[KeyPath, int] = {}
    twice: list[tuple[KeyPath, int, int]] = []
    around: list[str] = []  # per open bracket the key it is the value of
    key = ""
    line, seen = 1, 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in "{[":
            around.append(key)
            key = ""
        elif token in "}]":
            if around:
                around.pop()
        elif _COLON.match(text, match.end()):
            line += text.count("\n", seen, match.start())
            seen = match.start()
            key = json.loads(token)
            path = (*(name for name in around if name), key)
            if path in lines:
                twice.append((path, lines[path], line))
            lines[path] = line
    return lines, twice
