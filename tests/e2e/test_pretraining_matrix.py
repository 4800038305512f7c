"""Every text processor with the target and models it is for: corpus -> data set -> a few steps -> weights that load."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from tencentpretrain.checkpoint.files import read_tensors
from tencentpretrain.entry.preprocess import main as preprocess
from tencentpretrain.entry.pretrain import main as pretrain
from tencentpretrain.registry import OPTIMIZERS, PROCESSORS, SCHEDULES

WORDS = [f"{first}{second}" for first in "bdfgklmnprstvz" for second in ("a", "eo", "ilu", "ory", "umpt")]
SPECIAL = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTINELS = [f"<extra_id_{number}>" for number in range(40)]
SIZES = "--emb_size 32 --hidden_size 32 --feedforward_size 64 --heads_num 2 --layers_num 2 --max_seq_length 64"
STEPS = 6


@dataclass(frozen=True)
class Row:
    """One line of the matrix."""

    name: str
    processor: str
    corpus: str
    config: str
    flags: str = ""
    decoder: bool = False
    tgt_vocab: bool = False
    size: str = SIZES


MATRIX = (
    Row("bert-static", "bert", "documents.txt", "bert/tiny"),
    Row("bert-dynamic", "bert", "documents.txt", "bert/tiny", "--dynamic_masking"),
    Row("bert-whole-word", "bert", "documents.txt", "bert/mini", "--whole_word_masking"),
    Row("bert-span", "bert", "documents.txt", "bert/mini", "--span_masking"),
    Row("mlm-static", "mlm", "lines.txt", "bert/mini", "--target mlm"),
    Row("mlm-dynamic", "mlm", "lines.txt", "bert/mini", "--target mlm --dynamic_masking"),
    Row("mlm-full-sentences", "mlm", "lines.txt", "bert/mini", "--target mlm --full_sentences"),
    Row("mlm-packed-full-sentences", "mlm", "lines.txt", "bert/mini", "--target mlm --full_sentences --pack_documents"),
    Row("mlm-span", "mlm", "lines.txt", "xlm-roberta/base", "--target mlm --span_masking"),
    Row("albert", "albert", "documents.txt", "albert/base", "--emb_size 16"),
    Row("lm-text", "lm", "lines.txt", "gpt2/"),
    Row("lm-json", "lm", "text.jsonl", "llama/7b", "--json_format_corpus"),
    Row("llm-pretrain", "llm_pretrain", "text.jsonl", "llama/7b"),
    Row("llm-pretrain-grouped", "llm_pretrain", "text.jsonl", "llama2/70b", "--local_kv_heads_num 1"),
    Row("llm-sft", "llm_sft", "answers.jsonl", "llama/7b", "--prefix_lm_loss"),
    Row("llm-sft-packed", "llm_sft", "answers.jsonl", "llama/7b", "--prefix_lm_loss --pack_documents"),
    Row("lm-packed", "lm", "lines.txt", "gpt2/", "--pack_documents"),
    Row("lm-bloom", "lm", "lines.txt", "bloom/1b1"),
    Row("lm-bloom-alibi", "lm", "lines.txt", "bloom/1b1_alibi"),
    Row("bilm", "bilm", "lines.txt", "rnn/bilstm", size="--emb_size 32 --hidden_size 32 --layers_num 2"),
    Row("lm-lstm", "lm", "lines.txt", "rnn/lstm", size="--emb_size 32 --hidden_size 32 --layers_num 2"),
    Row("lm-gru", "lm", "lines.txt", "rnn/gru", size="--emb_size 32 --hidden_size 32 --layers_num 2"),
    Row("lm-gatedcnn", "lm", "lines.txt", "cnn/gatedcnn_9", size="--emb_size 32 --hidden_size 32 --layers_num 3"),
    Row("mt", "mt", "pairs.tsv", "transformer/base", decoder=True, tgt_vocab=True),
    Row("t5", "t5", "lines.txt", "t5/small", "--span_masking", decoder=True),
    Row("t5-v1_1", "t5", "lines.txt", "t5-v1_1/small", "--attention_head_size 8", decoder=True),
    Row("gsg-lead", "gsg", "documents.txt", "pegasus/base", decoder=True),
    Row("gsg-random", "gsg", "documents.txt", "pegasus/base", "--sentence_selection_strategy random", decoder=True),
    Row("bart", "bart", "documents.txt", "bart/base", decoder=True),
    Row("prefixlm", "prefixlm", "pairs.tsv", "gpt2/", "--mask causal_with_prefix"),
    Row("cls", "cls", "labelled.tsv", "bert/tiny", "--target cls --labels_num 2"),
    Row("cls-mlm", "cls_mlm", "labelled.tsv", "bert/tiny", "--target mlm cls --labels_num 2"),
)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small corpus of each kind and the vocabularies."""
    folder = tmp_path_factory.mktemp("corpora")
    draw = random.Random(7)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(4, 12)))

    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS, *SENTINELS]) + "\n", encoding="utf-8")
    (folder / "tgt_vocab.txt").write_text("\n".join([*SPECIAL, *reversed(WORDS[:40])]) + "\n", encoding="utf-8")
    documents = "\n".join("\n".join(sentence() for _ in range(draw.randint(3, 9))) + "\n" for _ in range(40))
    lines = [" ".join(sentence() for _ in range(draw.randint(1, 8))) for _ in range(120)]
    pairs = [f"{sentence()}\t{sentence()}" for _ in range(120)]
    files = {
        "documents.txt": documents,
        "lines.txt": "\n".join(lines) + "\n",
        "text.jsonl": "\n".join(json.dumps({"text": line}) for line in lines) + "\n",
        "pairs.tsv": "\n".join(pairs) + "\n",
        "labelled.tsv": "\n".join(f"{draw.randint(0, 1)}\t{sentence()}" for _ in range(120)) + "\n",
        "answers.jsonl": "\n".join(
            json.dumps({"instruction": sentence(), "input": "", "output": sentence()}) for _ in range(120)
        )
        + "\n",
    }
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def config_path(name: str) -> str:
    return f"models/{name}config.json" if name.endswith("/") else f"models/{name}_config.json"


def run_row(row: Row, corpora: Path, folder: Path, steps: int = STEPS, extra: str = "") -> list[dict]:
    """Takes a row through the line and returns its training records."""
    dataset, model = folder / f"{row.name}.pt", folder / f"{row.name}.bin"
    vocabulary = ["--vocab_path", str(corpora / "vocab.txt")]
    if row.tgt_vocab:
        vocabulary += ["--tgt_vocab_path", str(corpora / "tgt_vocab.txt")]
    json_format = ["--json_format_corpus"] if "--json_format_corpus" in row.flags else []
    lengths = ["--seq_length", "32", "--tgt_seq_length", "32"]
    kind = ["--data_processor", row.processor]
    source = ["--corpus_path", str(corpora / row.corpus), "--dataset_path", str(dataset)]
    assert preprocess([*source, *vocabulary, *kind, *lengths, *json_format]) == 0
    depth = ["--decoder_layers_num", "2"] if row.decoder else []
    flags = [*row.size.split(), *depth, *row.flags.replace("--json_format_corpus", "").split(), *extra.split()]
    run = ["--config_path", config_path(row.config), "--dataset_path", str(dataset), "--output_model_path", str(model)]
    length = ["--total_steps", str(steps), "--report_steps", "2", "--batch_size", "8", "--learning_rate", "1e-3"]
    assert pretrain([*run, *vocabulary, *kind, *lengths, *length, "--num_workers", "0", *flags]) == 0
    assert read_tensors(f"{model}-{steps}")
    records = [json.loads(line) for line in Path(f"{model}.run/metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


@pytest.mark.parametrize("row", MATRIX, ids=lambda row: row.name)
def test_row(row: Row, corpora: Path, tmp_path: Path) -> None:
    records = run_row(row, corpora, tmp_path)
    assert [record["step"] for record in records] == [2, 4, 6]
    classes = len(SPECIAL) + len(WORDS) + len(SENTINELS)
    for record in records:
        for name, loss in record["losses"].items():
            ceiling = math.log(2) if name in ("sp", "cls") else math.log(classes)
            assert 0 < loss < 1.6 * ceiling, f"{name} {loss} at step {record['step']}"


def test_matrix_has_every_processor() -> None:
    assert {row.processor for row in MATRIX} == set(PROCESSORS.names())


@pytest.mark.parametrize("schedule", SCHEDULES.names())
@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_every_optimizer_with_every_schedule(optimizer: str, schedule: str, corpora: Path, tmp_path: Path) -> None:
    row = next(row for row in MATRIX if row.name == "lm-text")
    records = run_row(row, corpora, tmp_path, steps=4, extra=f"--optimizer {optimizer} --scheduler {schedule}")
    assert all(math.isfinite(record["loss"]) for record in records)
    assert any(record["lr"] > 0 for record in records)
