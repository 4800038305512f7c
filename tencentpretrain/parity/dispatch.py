"""Finds out what a recorded file is, and which check it belongs to."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tencentpretrain.parity.base import CaseResult


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of record: the module in this folder that checks it, and the keys by which its JSON is known."""

    module: str
    keys: frozenset[str]
    vocabularies: bool = False
    """Whether its records name vocabularies by file name, so that `check` takes their folder."""

    def recognises(self, content: Any) -> bool:
        """Says whether the content of a JSON file is of this kind."""
        return isinstance(content, dict) and self.keys <= content.keys()


KINDS = (
    Kind(module="tokenizers", keys=frozenset({"tokenizer", "cases"}), vocabularies=True),
    Kind(module="units", keys=frozenset({"family", "cases"})),
    Kind(module="models", keys=frozenset({"family", "config", "inputs", "outputs"})),
    Kind(module="curves", keys=frozenset({"config", "pretrain_flags"})),
    Kind(module="data", keys=frozenset({"data_processor", "instances"}), vocabularies=True),
    Kind(module="data", keys=frozenset({"processors", "seeds"}), vocabularies=True),
    Kind(module="optim", keys=frozenset({"steps", "cases"})),
    Kind(module="optim", keys=frozenset({"cases", "tri_stage_without_decay"})),
)


def one_per_record(results: Sequence[CaseResult]) -> list[CaseResult]:
    """Joins the quantities of a record ("bert/encoder", "bert/loss.mlm") into one result with the worst of them."""
    groups: dict[str, list[CaseResult]] = {}
    for result in results:
        groups.setdefault(result.name.split("/")[0], []).append(result)
    return [_joined(name, group) for name, group in groups.items()]


def _joined(name: str, results: Sequence[CaseResult]) -> CaseResult:
    if len(results) == 1:
        return results[0]
    missed = [result for result in results if not result.passed]
    worst = max(missed or results, key=lambda result: result.deviation)
    where = f"worst of {len(results)}: {worst.name.removeprefix(name + '/')}"
    missing = f"missed: {', '.join(result.name.removeprefix(name + '/') for result in missed)}" if missed else ""
    detail = "; ".join(dict.fromkeys(text for text in (where, missing, worst.detail) if text))
    return CaseResult(name=name, passed=not missed, deviation=worst.deviation, detail=detail)


def check_folder(folder: Path, vocabularies: Path) -> Iterator[CaseResult]:
    """Checks every JSON record below a folder (or one record), in order of name.

    A file that no check knows gives a result that has not passed: nothing is left out in silence.

    Args:
        folder: a folder of records, or one record.
        vocabularies: where the vocabularies that records name by file name are.
    """
    for path in sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, ValueError) as error:
            yield CaseResult(
                name=path.stem, passed=False, deviation=float("nan"), detail=f"{path} is not JSON: {error}"
            )
            continue
        kind = next((kind for kind in KINDS if kind.recognises(content)), None)
        if kind is None:
            yield CaseResult(
                name=path.stem, passed=False, deviation=float("nan"), detail="no check knows such a record"
            )
            continue
        checker = importlib.import_module(f"tencentpretrain.parity.{kind.module}")
        results = checker.check(path, vocabularies) if kind.vocabularies else checker.check(path)
        yield from one_per_record(results)
