"""Two real Chinese corpora, from text to accuracy on a real dev set.

For each corpus: preprocess, pre-train a BERT-mini with rotary positions on the mlm target, fine-tune the pre-trained
and the random model with the same budget. Writes benchmarks/results/real_corpora.json.

    python benchmarks/real_corpora.py --data ../shared/data --steps 800
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "real_corpora.json"


# Rotary positions: a masked model with learned ones needs ten times the steps before it looks at neighbours.
BODY = (
    "--config_path", "models/bert/mini_config.json", "--embedding", "word", "seg", "--rotary_position_embedding",
    "--layernorm_positioning", "pre",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text to pre-train on and a labelled set to fine-tune on, as paths below the data folder."""

    name: str
    text: str
    task: str


CORPORA = (
    Corpus(name="reviews", text="corpora/chnsenticorp.txt", task="tasks/chnsenticorp"),
    Corpus(name="news", text="corpora/CLUECorpusSmall_sampled.txt", task="tasks/book_review"),
)


def command(*words: object) -> None:
    """Runs a sub-command and shows its output; ends this program if it fails."""
    subprocess.run([sys.executable, "-m", "tencentpretrain", *map(str, words)], check=True, cwd=ROOT)


def best_accuracy(model: Path) -> float:
    """Returns the best dev accuracy of a fine-tuning run."""
    lines = Path(f"{model}.run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(record["dev_accuracy"] for record in map(json.loads, lines) if "dev_accuracy" in record)


def last_loss(model: Path) -> float:
    """Returns the last reported loss of a pre-training run."""
    lines = Path(f"{model}.run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record][-1]


def run(corpus: Corpus, data: Path, folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Takes one corpus through the whole line and returns its figures."""
    vocabulary = ("--vocab_path", data / "vocab" / "google_zh_vocab.txt")
    config = (*BODY, "--target", "mlm")
    dataset, model = folder / f"{corpus.name}.pt", folder / f"{corpus.name}.bin"
    command(
        "preprocess", "--corpus_path", data / corpus.text, *vocabulary, "--dataset_path", dataset,
        "--processes_num", 2, "--data_processor", "mlm",
    )  # fmt: skip
    command(
        "pretrain", *config, *vocabulary, "--dataset_path", dataset, "--data_processor", "mlm", "--dynamic_masking",
        "--full_sentences", "--output_model_path", model, "--total_steps", options.steps,
        "--save_checkpoint_steps", options.steps, "--report_steps", 100, "--batch_size", 16, "--seq_length", 64,
        "--learning_rate", 1e-3, "--max_grad_norm", 1, "--dropout", 0, "--bf16",
    )  # fmt: skip
    accuracy = {}
    for name, weights in {"random": (), "pre-trained": ("--pretrained_model_path", f"{model}-{options.steps}")}.items():
        tuned = folder / f"{corpus.name}-{name}.bin"
        command(
            "finetune", "classifier", *config, *vocabulary, *weights, "--train_path", data / corpus.task / "train.tsv",
            "--dev_path", data / corpus.task / "dev.tsv", "--output_model_path", tuned, "--epochs_num", options.epochs,
            "--batch_size", 32, "--seq_length", 64, "--learning_rate", 3e-4, "--bf16",
        )  # fmt: skip
        accuracy[name] = best_accuracy(tuned)
    return {**asdict(corpus), "pretraining_loss": last_loss(model), "dev_accuracy": accuracy}


def main() -> None:
    """Runs both corpora and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with corpora, tasks, vocab"
    )
    parser.add_argument("--steps", type=int, default=800, help="pre-training batches per corpus (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="fine-tuning epochs (default %(default)s)")
    options = parser.parse_args()
    if not options.data.is_dir():
        parser.error(f"{options.data} does not exist; give the folder with corpora, tasks and vocab as --data")
    with tempfile.TemporaryDirectory() as folder:
        figures = [run(corpus, options.data.resolve(), Path(folder), options) for corpus in CORPORA]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": "bert mini, rotary, pre-norm",
        "steps": options.steps,
        "batch": "16 x 64",
        "epochs": options.epochs,
    }
    RESULTS.write_text(json.dumps({"settings": settings, "corpora": figures}, indent=1) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
