"""Share of a training step spent waiting for data, in a real pre-training run of BERT-base.

The corpus is the documentation inside CPython, the vocabulary is trained on it, the samples are drawn with dynamic
masking while the model trains. `--tiny` trains the smallest model instead, the hardest case for a loader.

    python benchmarks/loader.py --threads 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

SIZES = {"base": "models/bert/base_config.json", "tiny": "models/bert/tiny_config.json"}


def command(*words: object) -> None:
    """Runs a sub-command quietly; ends this program with its output if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "tencentpretrain", *map(str, words)],
        cwd=measure.ROOT, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout)


def train(size: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains for some steps and returns the reported shares of waiting, the first report left out."""
    model = folder / size
    command(
        "pretrain", "--config_path", SIZES[size], "--vocab_path", folder / "vocab.txt", "--dataset_path",
        folder / "store", "--output_model_path", model, "--total_steps", options.steps, "--save_checkpoint_steps",
        options.steps, "--report_steps", max(1, options.steps // 6), "--batch_size", options.batch_size,
        "--seq_length", options.seq_length, "--num_workers", options.num_workers, "--threads", options.threads,
        "--dynamic_masking", "--bf16", "--device", "cpu",
    )  # fmt: skip
    lines = Path(f"{model}.run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    reports = [record["timing"] for record in map(json.loads, lines) if record.get("kind") == "train"][1:]
    if not reports:
        raise SystemExit("too few steps for two reports; raise --steps")
    return {
        "model": f"BERT-{size}",
        "batch": options.batch_size,
        "length": options.seq_length,
        "data_wait": measure.spread([report["data_wait"] for report in reports], 5),
        "tokens_per_second": measure.spread([report["tokens_per_second"] for report in reports], 0),
    }


def main() -> None:
    """Prepares the data, trains, writes the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="cores to use (default %(default)s)")
    parser.add_argument("--steps", type=int, default=18, help="steps (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="samples per step (default %(default)s)")
    parser.add_argument("--seq_length", type=int, default=128, help="tokens per sample (default %(default)s)")
    parser.add_argument("--num_workers", type=int, default=1, help="loader processes (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="train BERT-tiny instead of BERT-base; writes no file")
    options = parser.parse_args()
    measure.pin(options.threads)

    from tencentpretrain.demo.corpus import write_corpus

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder).documents
        command(
            "build-vocab", "--corpus_path", corpus, "--output_path", folder / "vocab.txt", "--vocab_size", 21128
        )  # fmt: skip
        command(
            "preprocess", "--corpus_path", corpus, "--vocab_path", folder / "vocab.txt", "--dataset_path",
            folder / "store", "--data_processor", "bert", "--seq_length", options.seq_length,
        )  # fmt: skip
        figures = train("tiny" if options.tiny else "base", folder, options)
    measure.print_table(
        ("model", "tok/s", "waiting", "lowest", "highest"),
        [[figures["model"], figures["tokens_per_second"]["median"], *(
            f"{figures['data_wait'][key]:.2%}" for key in ("median", "lowest", "highest")
        )]],
    )  # fmt: skip
    if not options.tiny:
        measure.write_results("loader", {"environment": measure.environment(options.threads, "torch"), "run": figures})


if __name__ == "__main__":
    main()
