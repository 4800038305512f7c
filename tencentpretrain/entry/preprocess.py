"""Turns a corpus into a store of token ids."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from tencentpretrain.config.cli import Parsed, parse_sections
from tencentpretrain.config.data import CARRIED, CorpusConfig, DataConfig
from tencentpretrain.config.options import Part
from tencentpretrain.entry.run import run_main
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.tokenizers.config import TokenizerConfig

_DESCRIPTION = """Tokenises a corpus once into a store, from which pretrain.py draws samples of any objective that reads
the same kind of record. Lengths, masking and duplication given here are kept in the store as defaults of pretrain.py.
An interrupted run continues where it stopped when the same command is given again."""
_EXAMPLES = (
    "preprocess.py --corpus_path corpora/book_review_bert.txt --vocab_path models/google_zh_vocab.txt "
    "--dataset_path book_review --processes_num 8 --data_processor bert",
    "preprocess.py --corpus_path wiki.jsonl.zst --json_format_corpus --tokenizer bpe --vocab_path vocab.txt "
    "--merges_path merges.txt --dataset_path wiki --data_processor lm --seq_length 1024",
    "preprocess.py --executor ray --ray_address head:6379 --processes_num 128 --corpus_path shared/wiki.jsonl.zst "
    "--json_format_corpus --vocab_path shared/vocab.txt --dataset_path shared/wiki --data_processor lm",
)
_TEXT_ONLY = ("image", "text_image", "virtual")
_ACCEPTED = ("dataset_path", "seed", "loss_on_final_pad")


class TargetTokenizerConfig(TokenizerConfig):
    """The tokenizer of targets; absent unless its vocabulary is named."""

    @property
    def named(self) -> bool:
        """Whether there is a target tokenizer of its own."""
        return bool(self.vocab_path or self.spm_model_path)

    def problems(self) -> Iterator[str]:
        """Yields what is missing, if there is a target tokenizer at all."""
        if self.named:
            yield from super().problems()


SECTIONS = (
    CorpusConfig,
    DataConfig,
    TokenizerConfig,
    Part(name="tgt_tokenizer", section=TargetTokenizerConfig, prefix="tgt_"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the flags, builds the store and prints its account."""
    return run_main(lambda: _preprocess(argv))


def _problems(parsed: Parsed) -> Iterator[str]:
    data, corpus = parsed.get(DataConfig, "data"), parsed.get(CorpusConfig, "corpus")
    try:
        processor = PROCESSORS.canonical(data.data_processor)
    except ConfigError as error:
        yield f"data_processor: {error}"
        return
    for name in DataConfig.model_fields:
        if name not in (*CARRIED, *_ACCEPTED) and parsed.given(name):
            yield f"{name}: has no effect on a data set; give it to pretrain.py"
    if corpus.json_format_corpus and processor not in ("lm", "mlm", "bilm", "t5", "llm_pretrain"):
        yield f"json_format_corpus: has no effect with data_processor {processor!r}, which has its own format"
    if parsed.get(TargetTokenizerConfig, "tgt_tokenizer").named and processor != "mt":
        yield f"tgt_vocab_path: only data_processor 'mt' has targets of another vocabulary, not {processor!r}"
    if corpus.executor == "ray" and find_spec("ray") is None:
        yield "executor: 'ray' needs the package ray, which is not installed: pip install 'tencentpretrain[cluster]'"
    if corpus.executor != "ray" and parsed.given("ray_address"):
        yield "ray_address: has no effect without --executor ray"
    if corpus.ray_address != "auto" and not re.fullmatch(r"[^\s/]+:\d{1,5}", corpus.ray_address):
        yield f"ray_address: must be auto or host:port (as `ray start` prints it), not {corpus.ray_address!r}"
    if parsed.get(TokenizerConfig, "tokenizer").tokenizer in _TEXT_ONLY:
        yield f"tokenizer: data_processor {processor!r} needs a tokenizer of text"


def _preprocess(argv: Sequence[str] | None) -> int:
    parsed = parse_sections(
        "preprocess.py", _DESCRIPTION, SECTIONS, argv, examples=_EXAMPLES, config_file=None, checks=(_problems,)
    )
    for notice in parsed.notices:
        print(notice)
    corpus, data = parsed.get(CorpusConfig, "corpus"), parsed.get(DataConfig, "data")
    target = parsed.get(TargetTokenizerConfig, "tgt_tokenizer")

    from tencentpretrain.data.build import build_store
    from tencentpretrain.data.progress import BuildProgress
    from tencentpretrain.data.settings import carried_settings
    from tencentpretrain.tokenizers import build_tokenizer

    processor = PROCESSORS.get(data.data_processor)
    progress = BuildProgress()
    began = time.perf_counter()
    print(f"Starting {corpus.processes_num} workers for building datasets ... ", flush=True)
    try:
        result = build_store(
            corpus,
            data.dataset_path,
            processor=data.data_processor,
            record_format=processor.corpus_format(json_lines=corpus.json_format_corpus),
            tokenizer=functools.partial(build_tokenizer, parsed.get(TokenizerConfig, "tokenizer")),
            tgt_tokenizer=functools.partial(build_tokenizer, target) if target.named else None,
            settings=carried_settings(data, parsed.given),
            overwrite=corpus.overwrite,
            reporter=progress,
        )
    finally:
        progress.finish()
    header = result.store.header
    if result.existed:
        print(f"{data.dataset_path}: is complete already, made from the same corpus with the same tokenizer")
    seconds = time.perf_counter() - began
    print(header.account)
    if header.account.total_rejected:
        print(f"The rejected lines are listed in {result.store.path / 'rejected.jsonl'}")
    tokens = result.store.num_tokens
    rate = "" if result.existed else f" in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
    print(f"{data.dataset_path}: {len(result.store):,} records, {tokens:,} tokens{rate}")
    return 0
