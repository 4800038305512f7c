"""Checks data processors against recorded instances, batches and statistics."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tencentpretrain.config.data import CorpusConfig, DataConfig
from tencentpretrain.data.arrays import IGNORE
from tencentpretrain.data.build import build_store
from tencentpretrain.data.chunks import ChunkPlan
from tencentpretrain.data.loader import Loader
from tencentpretrain.data.processor import Processor
from tencentpretrain.data.random import SAMPLE, KeyedGenerator
from tencentpretrain.data.store import Store
from tencentpretrain.errors import TencentPretrainError
from tencentpretrain.parity.base import CaseResult
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer
from tencentpretrain.tokenizers.base import Tokenizer

_TOKENIZER_FLAGS = ("tokenizer", "vocab_path", "merges_path", "spm_model_path")
_WITHOUT_TEXT = ("vit", "beit", "clip", "s2t", "vilt", "dalle")
_FIELDS = {
    "src": lambda batch: batch.token_ids,
    "tgt": lambda batch: next(iter(batch.labels.values())),
    "seg": lambda batch: batch.segment_ids,
    "tgt_in": lambda batch: batch.decoder_token_ids,
    "tgt_seg": lambda batch: batch.decoder_segment_ids,
    "tgt_forward": lambda batch: batch.labels["bilm_forward"],
    "tgt_backward": lambda batch: batch.labels["bilm_backward"],
}


def check(path: Path, vocabularies: Path) -> list[CaseResult]:
    """Compares a record with what our processors make of the same corpus; statistics give one result per entry.

    Args:
        path: a record; its corpus lies in `corpora` beside it.
        vocabularies: folder of the vocabularies that records name.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if "processors" in record:
        from tencentpretrain.parity.data_statistics import check_statistics

        return check_statistics(path, record, vocabularies)
    if record["data_processor"] in _WITHOUT_TEXT:
        return [_failure(path.stem, "belongs to the vision/speech line: there is no processor of this name yet")]
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepare(
                record["data_processor"], record["flags"], path.parent / record["corpus"], vocabularies, Path(folder)
            )
            return [_compare(path, record, prepared)]
    except TencentPretrainError as error:
        return [_failure(path.stem, str(error))]


class Prepared:
    """A store made from a record's corpus, and the processor of the record."""

    def __init__(self, store: Store, processor: Processor[Any, Any], tokenizer: Tokenizer) -> None:
        self.store = store
        self.processor = processor
        self.tokenizer = tokenizer

    def examples(self, epoch: int = 0) -> Iterator[Any]:
        """Yields the samples of an epoch in file order."""
        plan = self.processor.plan(self.store, epoch)
        generator = KeyedGenerator(self.processor.data.seed, SAMPLE)
        for index in range(len(plan)):
            rng = generator.at(self.processor.draw_version(epoch), index)
            yield self.processor.sample(self.store, plan, index, rng)


def prepare(
    name: str, flags: dict[str, Any], corpus: Path, vocabularies: Path, folder: Path, **settings: Any
) -> Prepared:
    """Preprocesses a record's corpus with its flags, in the manner of old runs."""
    source = functools.partial(build_tokenizer, _tokenizer_config(flags, "", vocabularies))
    has_target = any(f"tgt_{key}" in flags for key in _TOKENIZER_FLAGS)
    target = functools.partial(build_tokenizer, _tokenizer_config(flags, "tgt_", vocabularies)) if has_target else None
    known = {key: value for key, value in flags.items() if key in DataConfig.model_fields}
    manner = {"keep_blank_lines": True, "loss_on_final_pad": True, "shuffle": False, **settings}
    data = DataConfig.model_validate({"data_processor": name, **known, **manner})
    kind = PROCESSORS.get(name)
    result = build_store(
        CorpusConfig(corpus_path=str(corpus), max_rejected=1.0),
        folder / "store",
        processor=name,
        record_format=kind.corpus_format(json_lines=flags.get("json_format_corpus", False)),
        tokenizer=source,
        tgt_tokenizer=target,
    )
    tokenizer = source()
    return Prepared(result.store, kind(data, tokenizer, target() if target else None), tokenizer)


def _tokenizer_config(flags: dict[str, Any], prefix: str, vocabularies: Path) -> TokenizerConfig:
    given = {key: flags[prefix + key] for key in _TOKENIZER_FLAGS if prefix + key in flags}
    paths = {key: str(vocabularies / value) for key, value in given.items() if key.endswith("_path")}
    return TokenizerConfig.model_validate({**given, **paths})


def _compare(path: Path, record: dict[str, Any], prepared: Prepared) -> CaseResult:
    expected, note = record["instances"], ""
    if expected is None:
        twin = path.with_name("lm_json_full_sentences.json")
        expected = json.loads(twin.read_text(encoding="utf-8"))["instances"]
        note = f"the recorded run failed ({record['error'].partition(':')[0]}); compared with {twin.stem}"
    ours = [json.loads(json.dumps(prepared.processor.encode_instance(example))) for example in prepared.examples()]
    if record["data_processor"] == "gsg" and _of_last_document(prepared, len(expected)):
        extra = len(ours) - len(expected)
        ours = ours[: len(expected)]
        note = f"we also have {extra} samples of the last document, which the recorded run lost"
    different = [index for index, pair in enumerate(zip(ours, expected)) if pair[0] != pair[1]]  # noqa: B905
    if len(ours) != len(expected) or different:
        first = f", first difference at {different[0]}" if different else ""
        return CaseResult(
            name=path.stem,
            passed=False,
            deviation=len(different) + abs(len(ours) - len(expected)),
            detail=f"{len(ours)} instances, recorded {len(expected)}, {len(different)} differ{first}",
        )
    wrong = _compare_batches(record.get("batches"), prepared)
    detail = "; ".join(filter(None, [f"{len(expected)} instances equal", note, *wrong]))
    return CaseResult(name=path.stem, passed=not wrong, deviation=len(wrong), detail=detail)


def _of_last_document(prepared: Prepared, index: int) -> bool:
    """Says whether the samples from `index` onwards are those of the last document."""
    plan: ChunkPlan = prepared.processor.plan(prepared.store, 0)
    begins = plan.sentences[plan.begin]
    return int(np.searchsorted(begins, prepared.store.record_offsets[-2])) == index < len(plan)


def _compare_batches(recorded: dict[str, Any] | None, prepared: Prepared) -> list[str]:
    """Compares the first batches, and those of three ranks; returns what differs."""
    if recorded is None:
        return []
    wrong = []
    size = recorded["batch_size"]
    loader = Loader(prepared.store, prepared.processor, batch_size=size, seed=7, shuffle=False, num_workers=0)
    for number, (batch, fields) in enumerate(zip(loader, recorded["first_two"], strict=False)):
        for name, values in zip(recorded["fields"], fields, strict=True):
            ours = np.asarray(_FIELDS[name](batch))
            # Old batches had 0 where we say that a position does not count.
            if not np.array_equal(np.where(ours == IGNORE, 0, ours), np.asarray(values)):
                wrong.append(f"{name} of batch {number} differs")
    for rank, values in enumerate(recorded.get("first_src_world_size_3", [])):
        loader = Loader(
            prepared.store, prepared.processor, batch_size=size, seed=7, shuffle=False, rank=rank, world_size=3,
            num_workers=0,
        )  # fmt: skip
        if not np.array_equal(np.asarray(next(iter(loader)).token_ids), np.asarray(values)):
            wrong.append(f"the first batch of rank {rank} of 3 differs")
    return wrong


def _failure(name: str, detail: str) -> CaseResult:
    return CaseResult(name=name, passed=False, deviation=math.nan, detail=detail)
