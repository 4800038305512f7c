"""Checks tokenizers against recorded tokens and ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tencentpretrain.errors import TencentPretrainError
from tencentpretrain.parity.base import CaseResult
from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer
from tencentpretrain.tokenizers.base import Tokenizer

_FILE_FLAGS = ("vocab_path", "merges_path", "spm_model_path")


def is_tokenizer_fixture(content: object) -> bool:
    """Says whether the content of a JSON file is a record of a tokenizer."""
    return isinstance(content, dict) and {"tokenizer", "flags", "files", "cases"} <= set(content)


def check(path: Path, vocabulary_dir: Path) -> list[CaseResult]:
    """Compares every tokenizer record of a file or folder; one result per record.

    A record whose vocabulary is absent or has other bytes than the recorded one has not passed.

    Args:
        path: a record, or a folder of them; JSON files of other kinds in it are left out.
        vocabulary_dir: folder with vocabularies, merges and SentencePiece models under their recorded names.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    results: list[CaseResult] = []
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        if is_tokenizer_fixture(content):
            results.append(_check_record(file.stem, content, vocabulary_dir))
    return results


def _check_record(name: str, record: Mapping[str, Any], vocabulary_dir: Path) -> CaseResult:
    cases = record["cases"]
    for entry in record["files"].values():
        file = vocabulary_dir / entry["file"]
        if not file.is_file():
            return CaseResult(name=name, passed=False, deviation=len(cases), detail=f"{file} does not exist")
        if hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
            return CaseResult(name=name, passed=False, deviation=len(cases), detail=f"{file} is not the recorded file")
    flags = {
        key: str(vocabulary_dir / value) if key in _FILE_FLAGS else value for key, value in record["flags"].items()
    }
    try:
        tokenizer = build_tokenizer(TokenizerConfig(tokenizer=record["tokenizer"], **flags))
    except TencentPretrainError as error:
        return CaseResult(name=name, passed=False, deviation=len(cases), detail=str(error))
    wrong = _differing_texts(tokenizer, cases)
    detail = f"first difference: {wrong[0]!r}" if wrong else ""
    size = record.get("vocab_size", tokenizer.vocab_size)
    if tokenizer.vocab_size != size:
        detail = f"vocabulary has {tokenizer.vocab_size} entries, recorded {size}"
    return CaseResult(name=name, passed=not detail, deviation=len(wrong), detail=detail)


def _differing_texts(tokenizer: Tokenizer, cases: list[dict[str, Any]]) -> list[str]:
    """Returns the texts whose tokens or ids differ, encoding them one by one and all at once."""
    texts = [case["text"] for case in cases]
    together = tokenizer.encode_batch(texts)
    return [
        case["text"]
        for case, ids in zip(cases, together, strict=True)
        if tokenizer.tokenize(case["text"]) != case["tokens"]
        or tokenizer.encode(case["text"]) != case["ids"]
        or ids.tolist() != case["ids"]
    ]
