"""The special tokens of a run: their names from a map, their ids from the vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from tencentpretrain.errors import ConfigError, DataFormatError
from tencentpretrain.registry import nearest
from tencentpretrain.sniff import describe_file

_KEYS = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "sentinel_token")
# Keys of Hugging Face's file of the same name that carry a role under another name, or none of ours.
_ROLE_OF_FOREIGN_KEY = {"bos_token": "cls_token", "eos_token": "sep_token"}
_FOREIGN_KEYS = {*_ROLE_OF_FOREIGN_KEY, "additional_special_tokens"}


@dataclass(frozen=True, kw_only=True)
class SpecialTokenNames:
    """The names of the special tokens. cls begins a sequence, sep separates and ends; sentinels start at `sentinel`."""

    pad: str
    unk: str
    cls: str
    sep: str
    mask: Optional[str] = None
    sentinel: Optional[str] = None


BERT_NAMES = SpecialTokenNames(
    pad="[PAD]", unk="[UNK]", cls="[CLS]", sep="[SEP]", mask="[MASK]", sentinel="<extra_id_0>"
)
XLMROBERTA_NAMES = SpecialTokenNames(pad="<pad>", unk="<unk>", cls="<s>", sep="</s>", mask="<mask>")
LLAMA_NAMES = SpecialTokenNames(pad="<0x00>", unk="<unk>", cls="<s>", sep="</s>", mask="<mask>")

BUILT_IN_MAPS: Mapping[str, SpecialTokenNames] = {
    "special_tokens_map.json": BERT_NAMES,
    "xlmroberta_special_tokens_map.json": XLMROBERTA_NAMES,
    "llama_special_tokens_map.json": LLAMA_NAMES,
}


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the special tokens in one vocabulary.

    `mask_id` and `sentinel_id` are None where the vocabulary has no such token; sentinels are the `num_sentinels`
    consecutive ids from `sentinel_id` upwards.
    """

    names: SpecialTokenNames
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: Optional[int] = None
    sentinel_id: Optional[int] = None
    num_sentinels: int = 0

    def ids(self) -> tuple[int, ...]:
        """Returns the ids of all special tokens without the sentinels, each once."""
        found = (self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id)
        return tuple(dict.fromkeys(index for index in found if index is not None))


def read_special_token_names(path: str) -> SpecialTokenNames:
    """Reads a special-token map. The three published file names are known even where the file is not at hand.

    Raises:
        ConfigError: the file is absent, or a key is missing or unknown.
        DataFormatError: the file is not JSON.
    """
    file = Path(path)
    if not file.is_file():
        if file.name in BUILT_IN_MAPS:
            return BUILT_IN_MAPS[file.name]
        raise ConfigError(f"special_tokens_map: {path} does not exist")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except ValueError as error:
        what = describe_file(file) or f"not a JSON object ({error})"
        raise DataFormatError(f"{path}: a special-token map is a JSON object, but this is {what}") from None
    return _names_from_json(content, path)


def _names_from_json(content: Mapping[str, object], path: str) -> SpecialTokenNames:
    problems: list[str] = []
    names: dict[str, str] = {}
    for key, value in content.items():
        if key not in _KEYS and key not in _FOREIGN_KEYS:
            problems.append(f"{key}: unknown key{nearest(key, _KEYS)}")
        if isinstance(value, Mapping):  # Hugging Face writes {"content": "<s>", "lstrip": false, ...}
            value = value.get("content")
        if isinstance(value, str):
            names[key] = value
        elif key in _KEYS:
            problems.append(f"{key}: must be a string, but is {value!r}")
    for foreign, role in _ROLE_OF_FOREIGN_KEY.items():
        if foreign in names:
            names.setdefault(role, names[foreign])
    problems += [f"{key}: missing" for key in _KEYS[:4] if key not in names and key not in content]
    if problems:
        raise ConfigError(problems, source=path)
    return SpecialTokenNames(
        pad=names["pad_token"],
        unk=names["unk_token"],
        cls=names["cls_token"],
        sep=names["sep_token"],
        mask=names.get("mask_token"),
        sentinel=names.get("sentinel_token"),
    )


def detect_special_token_names(vocab: Mapping[str, int]) -> SpecialTokenNames | None:
    """Returns the published names that fit a vocabulary, or None if none do."""
    if BERT_NAMES.cls in vocab:
        return BERT_NAMES
    if XLMROBERTA_NAMES.cls in vocab and XLMROBERTA_NAMES.pad in vocab:
        return XLMROBERTA_NAMES
    if LLAMA_NAMES.cls in vocab and LLAMA_NAMES.pad in vocab:
        return LLAMA_NAMES
    return None


def find_special_tokens(
    vocab: Mapping[str, int], *, source: str, map_path: str | None, names: SpecialTokenNames | None = None
) -> SpecialTokens:
    """Finds the ids of the special tokens.

    Args:
        vocab: token to id.
        source: the vocabulary's file, for messages.
        map_path: the user's special-token map, which comes first.
        names: what the kind of tokenizer fixes, which comes before detection.

    Raises:
        ConfigError: no names are known, or a required token is not in the vocabulary; the message names token and file.
    """
    if map_path:
        names = read_special_token_names(map_path)
    names = names or detect_special_token_names(vocab)
    if names is None:
        raise ConfigError(
            f"{source}: the special tokens cannot be told from the vocabulary (neither '[CLS]', nor "
            "'<s>' with '<pad>' or '<0x00>', is in it); name them in a JSON file and pass --special_tokens_map FILE"
        )
    origin = map_path or "the map found from the vocabulary"
    required = {"pad_token": names.pad, "unk_token": names.unk, "cls_token": names.cls, "sep_token": names.sep}
    missing = [
        f"{key} {token!r} (from {origin}) is not in the vocabulary; pass a --special_tokens_map that fits it"
        for key, token in required.items()
        if token not in vocab
    ]
    if missing:
        raise ConfigError(missing, source=source)
    sentinel_id = vocab.get(names.sentinel) if names.sentinel else None
    return SpecialTokens(
        names=names,
        pad_id=vocab[names.pad],
        unk_id=vocab[names.unk],
        cls_id=vocab[names.cls],
        sep_id=vocab[names.sep],
        mask_id=vocab.get(names.mask) if names.mask else None,
        sentinel_id=sentinel_id,
        num_sentinels=_count_sentinels(vocab, names.sentinel),
    )


def _count_sentinels(vocab: Mapping[str, int], sentinel: str | None) -> int:
    """Counts the numbered tokens that follow the first sentinel without a gap: <extra_id_0>, <extra_id_1>, ..."""
    if sentinel is None or sentinel not in vocab:
        return 0
    numbered = re.fullmatch(r"(.*?)(\d+)(\D*)", sentinel)
    if numbered is None:
        return 1
    head, first, tail = numbered[1], int(numbered[2]), numbered[3]
    count = 1
    while vocab.get(f"{head}{first + count}{tail}") == vocab[sentinel] + count:
        count += 1
    return count
