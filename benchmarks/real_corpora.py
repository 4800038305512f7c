"""Two real Chinese corpora, from text to accuracy on a real dev set.

For each corpus: train a vocabulary, preprocess, pre-train a small BERT on the mlm target, fine-tune the pre-trained and
the random model with the same budget. Writes benchmarks/results/real_corpora.json.

    python benchmarks/real_corpora.py --data ../shared/data --steps 4000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tencentpretrain.demo.run import BERT

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "real_corpora.json"


# Few enough words that minutes of training leave the unigram plateau; with google_zh_vocab's 21,128 they do not.
VOCAB_SIZE = 5000


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
    words = folder / f"{corpus.name}-vocab.txt"
    vocabulary = ("--vocab_path", words)
    config = ("--config_path", folder / "config.json")
    config[1].write_text(json.dumps(BERT), encoding="utf-8")
    dataset, model = folder / f"{corpus.name}.pt", folder / f"{corpus.name}.bin"
    command(
        "build-vocab", "--corpus_path", data / corpus.text, "--type", "wordpiece", "--vocab_size", VOCAB_SIZE,
        "--output_path", words,
    )  # fmt: skip
    command(
        "preprocess", "--corpus_path", data / corpus.text, *vocabulary, "--dataset_path", dataset,
        "--processes_num", 2, "--data_processor", "lm",
    )  # fmt: skip
    command(
        "pretrain", *config, *vocabulary, "--dataset_path", dataset, "--data_processor", "mlm",
        "--full_sentences", "--dynamic_masking", "--output_model_path", model, "--total_steps", options.steps,
        "--save_checkpoint_steps", options.steps, "--report_steps", 100, "--batch_size", 16, "--seq_length", 64,
        "--learning_rate", 2e-3, "--max_grad_norm", 1, "--dropout", 0, "--bf16",
    )  # fmt: skip
    accuracy = {}
    for name, weights in {"random": (), "pre-trained": ("--pretrained_model_path", f"{model}-{options.steps}")}.items():
        tuned = folder / f"{corpus.name}-{name}.bin"
        command(
            "finetune", "classifier", *config, *vocabulary, *weights, "--train_path", data / corpus.task / "train.tsv",
            "--dev_path", data / corpus.task / "dev.tsv", "--output_model_path", tuned, "--epochs_num", options.epochs,
            "--batch_size", 32, "--seq_length", 128, "--learning_rate", 5e-4,
        )  # fmt: skip
        accuracy[name] = best_accuracy(tuned)
    return {**asdict(corpus), "pretraining_loss": last_loss(model), "dev_accuracy": accuracy}


def main() -> None:
    """Runs both corpora and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with corpora, tasks, vocab"
    )
    parser.add_argument("--steps", type=int, default=4000, help="pre-training batches per corpus (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="fine-tuning epochs (default %(default)s)")
    options = parser.parse_args()
    if not options.data.is_dir():
        parser.error(f"{options.data} does not exist; give the folder with corpora, tasks and vocab as --data")
    with tempfile.TemporaryDirectory() as folder:
        figures = [run(corpus, options.data.resolve(), Path(folder), options) for corpus in CORPORA]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": f"BERT, 2 layers of width 128, rotary positions, {VOCAB_SIZE} WordPieces trained on the corpus",
        "steps": options.steps,
        "batch": "16 x 64",
        "epochs": options.epochs,
    }
    RESULTS.write_text(json.dumps({"settings": settings, "corpora": figures}, indent=1) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
