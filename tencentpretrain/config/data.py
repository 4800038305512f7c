"""Where samples come from and how they are drawn."""

from __future__ import annotations

from typing import Literal, Optional

from tencentpretrain.config.base import Section, setting


class CorpusConfig(Section):
    """What `preprocess.py` reads and how it cuts the work."""

    corpus_path: str = setting(text="corpus: text, JSON lines or TSV, plain or .gz/.zst", topic="corpus")
    json_format_corpus: bool = setting(False, "each line is a JSON object with 'text' (lm)", topic="corpus")
    processes_num: int = setting(
        1, "worker processes (ray: on all machines together); the output does not depend on it", topic="corpus", ge=1
    )
    executor: Literal["local", "ray"] = setting(
        "local", "where the workers are: on this machine, or on those of a Ray cluster", topic="corpus"
    )
    ray_address: str = setting(
        "auto", "ray: host:port of the cluster's head; auto: the cluster that this machine belongs to", topic="corpus"
    )
    on_error: Literal["skip", "raise"] = setting(
        "skip", "a malformed line is kept aside, or ends the run", topic="corpus"
    )
    max_rejected: float = setting(
        0.001, "largest share of malformed lines that is accepted", topic="corpus", ge=0, le=1
    )
    overwrite: bool = setting(False, "replace what is at --dataset_path", topic="corpus")
    shard_bytes: int = setting(16 * 2**20, "source bytes per shard", topic="corpus", ge=1)


class DataConfig(Section):
    """How samples are made from a store: objective, lengths, masking, order."""

    data_processor: str = setting("bert", "pre-training format", topic="data")
    dataset_path: str = setting("dataset.pt", "data set written by preprocess.py", topic="data")
    dev_dataset_path: Optional[str] = setting(None, "data set for validation while training", topic="data")
    seq_length: int = setting(128, "source length in tokens", topic="data", ge=4)
    tgt_seq_length: int = setting(128, "target length in tokens", topic="data", ge=4)
    batch_size: int = setting(32, "samples per micro-batch and process", topic="data", ge=1)
    instances_buffer_size: int = setting(
        25600, "accepted for old command lines; order is shuffled by index", topic="data"
    )
    shuffle: bool = setting(True, "draw samples in a new seeded order each epoch, or in file order", topic="data")
    seed: int = setting(7, "seed of order, masks, dropout and initial weights", topic="data", ge=0)
    dup_factor: int = setting(
        5, "different random versions of a sample (1 per epoch; then they repeat)", topic="data", ge=1
    )
    dynamic_masking: bool = setting(False, "a new version every epoch, without end", topic="data")
    short_seq_prob: float = setting(0.1, "bert, albert: share of shortened samples", topic="data", ge=0, le=1)
    docs_buffer_size: int = setting(100000, "documents from which random sentences are drawn", topic="data", ge=1)
    full_sentences: bool = setting(False, "pack documents back to back (lm, llm_pretrain, mlm, t5)", topic="data")
    pack_documents: bool = setting(
        False,
        "several documents in a row, none of which sees another, each with positions of its own (lm, llm_pretrain, "
        "llm_sft, mlm): whole samples, or with full_sentences documents back to back",
        topic="data",
    )
    whole_word_masking: bool = setting(False, "mask all pieces of a word", topic="masking")
    span_masking: bool = setting(False, "mask spans", topic="masking")
    span_geo_prob: float = setting(0.2, "success probability of the span length law", topic="masking", gt=0, lt=1)
    span_max_length: int = setting(10, "longest span", topic="masking", ge=1)
    sentence_selection_strategy: Literal["lead", "random", "principal"] = setting(
        "lead", "gsg: which sentences are taken out", topic="masking"
    )
    text_infilling: bool = setting(
        False, "bart: Poisson(3) span infilling instead of 80/10/10 masking", topic="masking"
    )
    loss_on_final_pad: bool = setting(
        False, "also train the step from the last SEP to padding, as old runs did", topic="data"
    )
    keep_blank_lines: bool = setting(False, "a blank line is an empty document, as in old data sets", topic="data")
    num_workers: int = setting(
        1, "background processes that draw samples; 0: in the training process", topic="data", ge=0
    )


CARRIED = (
    "data_processor",
    "seq_length",
    "tgt_seq_length",
    "dup_factor",
    "short_seq_prob",
    "docs_buffer_size",
    "full_sentences",
    "pack_documents",
    "dynamic_masking",
    "whole_word_masking",
    "span_masking",
    "span_geo_prob",
    "span_max_length",
    "sentence_selection_strategy",
    "text_infilling",
    "keep_blank_lines",
)
"""Fields of DataConfig that `preprocess.py` may be given; a data set carries them to `pretrain.py` as its defaults."""
