"""The main job on an embedded default: corpus, vocabulary, data set, two pre-trained models, a classifier, a paragraph.

Every step is the command a user would type; the page at the end lists them.
"""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tencentpretrain.demo.corpus import DemoCorpus, write_corpus
from tencentpretrain.demo.report import DemoResult, Prediction, write_report
from tencentpretrain.errors import TencentPretrainError

BODY = {
    "emb_size": 128,
    "hidden_size": 128,
    "feedforward_size": 512,
    "heads_num": 4,
    "layers_num": 2,
    "max_seq_length": 128,
    "dropout": 0.1,
    "encoder": "transformer",
    "layernorm_positioning": "pre",
    "tie_weights": True,
}
BERT = BODY | {
    "data_processor": "mlm",
    "embedding": ["word", "seg"],
    # Rotary positions let a masked model look at neighbours after a few hundred steps; a learned table takes thousands.
    "rotary_position_embedding": True,
    "mask": "fully_visible",
    "hidden_act": "gelu",
    "target": ["mlm"],
}
GPT2 = BODY | {
    "data_processor": "lm",
    "embedding": ["word", "pos"],
    "remove_embedding_layernorm": True,
    "mask": "causal",
    "hidden_act": "gelu_fast",
    "target": ["lm"],
}
PROMPT = "return a new list"


class DemoFailed(TencentPretrainError):
    """A command of the demo ended with an error; its output is in the log."""


@dataclass
class Demo:
    """The demo's folder and the commands run in it so far."""

    folder: Path
    bert_steps: int = 2500
    gpt2_steps: int = 1500
    epochs: int = 3
    commands: list[str] = field(default_factory=list)

    def run(self) -> DemoResult:
        """Runs everything and writes `report.html`."""
        start = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        corpus = write_corpus(self.folder / "corpus")
        print(
            f"corpus: {corpus.num_docstrings} docstrings, {corpus.num_bytes / 1e6:.1f} MB, {len(corpus.labels)} classes"
        )
        self._prepare(corpus)
        self._pretrain("bert", BERT, self.bert_steps)
        self._pretrain("gpt2", GPT2, self.gpt2_steps)
        accuracies = {
            "majority class": majority_share(corpus.dev),
            "fine-tuned from random weights": self._finetune("scratch", corpus, []),
            "fine-tuned after pre-training": self._finetune(
                "pretrained", corpus, ["--pretrained_model_path", self._weights("bert", self.bert_steps)]
            ),
        }
        predictions = self._predict(corpus)
        generated = self._generate()
        result = DemoResult(
            corpus={
                "docstrings": f"{corpus.num_docstrings:,}",
                "text": f"{corpus.num_bytes / 1e6:.2f} MB",
                "classes": ", ".join(corpus.labels),
            },
            curves={name: Path(f"{self._model(name)}.run") / "metrics.jsonl" for name in ("bert", "gpt2")},
            accuracies=accuracies,
            predictions=predictions,
            prompt=PROMPT,
            generated=generated,
            commands=self.commands,
            seconds=time.monotonic() - start,
        )
        write_report(result, self.folder / "report.html")
        return result

    def _prepare(self, corpus: DemoCorpus) -> None:
        self._command(
            "build-vocab", "--corpus_path", corpus.lines, "--type", "wordpiece", "--vocab_size", 4000,
            "--lower_case", "--output_path", self.folder / "vocab.txt",
        )  # fmt: skip
        self._command(
            "preprocess", "--corpus_path", corpus.lines, "--vocab_path", self.folder / "vocab.txt",
            "--dataset_path", self.folder / "dataset.pt", "--processes_num", 2, "--data_processor", "lm", "--overwrite",
        )  # fmt: skip

    def _pretrain(self, name: str, config: dict[str, object], steps: int) -> None:
        path = self.folder / f"{name}_config.json"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self._command(
            "pretrain", "--config_path", path, "--dataset_path", self.folder / "dataset.pt",
            "--vocab_path", self.folder / "vocab.txt", "--output_model_path", self._model(name),
            "--full_sentences", "--dynamic_masking", "--seq_length", 64, "--batch_size", 16, "--learning_rate", 2e-3,
            "--max_grad_norm", 1, "--dropout", 0, "--total_steps", steps, "--save_checkpoint_steps", steps,
            "--report_steps", 100, *self._precision(),
        )  # fmt: skip

    def _finetune(self, name: str, corpus: DemoCorpus, weights: Sequence[object]) -> float:
        self._command(
            "finetune", "classifier", *weights, "--config_path", self.folder / "bert_config.json",
            "--vocab_path", self.folder / "vocab.txt", "--train_path", corpus.train, "--dev_path", corpus.dev,
            "--output_model_path", self._model(name), "--seq_length", 64, "--batch_size", 32,
            "--epochs_num", self.epochs, "--learning_rate", 5e-4, *self._precision(),
        )  # fmt: skip
        metrics = Path(f"{self._model(name)}.run") / "metrics.jsonl"
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        return max(float(record["dev_accuracy"]) for record in records if "dev_accuracy" in record)

    def _predict(self, corpus: DemoCorpus) -> list[Prediction]:
        output = self.folder / "prediction.tsv"
        self._command(
            "infer", "classifier", "--load_model_path", self._model("pretrained"),
            "--config_path", self.folder / "bert_config.json", "--vocab_path", self.folder / "vocab.txt",
            "--test_path", corpus.dev, "--prediction_path", output, "--seq_length", 64,
            "--labels_num", len(corpus.labels),
        )  # fmt: skip
        gold = _read_tsv(corpus.dev)
        predicted = _read_tsv(output)
        shown = range(0, len(gold), max(1, len(gold) // 12))
        return [
            Prediction(
                text=gold[row]["text_a"],
                gold=corpus.labels[int(gold[row]["label"])],
                predicted=corpus.labels[int(predicted[row]["label"])],
            )
            for row in shown
        ]

    def _generate(self) -> list[str]:
        prompt, output = self.folder / "prompt.txt", self.folder / "generated.txt"
        prompt.write_text(PROMPT + "\n", encoding="utf-8")
        self._command(
            "generate-lm", "--load_model_path", self._weights("gpt2", self.gpt2_steps),
            "--config_path", self.folder / "gpt2_config.json", "--vocab_path", self.folder / "vocab.txt",
            "--test_path", prompt, "--prediction_path", output, "--seq_length", 64, "--top_k", 40, "--temperature", 0.7,
        )  # fmt: skip
        return output.read_text(encoding="utf-8").splitlines()[1::2]  # prompts and texts take turns

    def _model(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _weights(self, name: str, steps: int) -> Path:
        return self.folder / f"{name}.bin-{steps}"

    def _precision(self) -> list[str]:
        import torch

        return ["--bf16"] if torch.cpu._is_avx512_bf16_supported() else []

    def _command(self, *words: object) -> None:
        """Runs a sub-command of `tencentpretrain`, showing its output."""
        shown = shlex.join(["tencentpretrain", *map(str, words)])
        self.commands.append(shown)
        print(f"\n$ {shown}", flush=True)
        done = subprocess.run([sys.executable, "-m", "tencentpretrain", *map(str, words)], check=False)
        if done.returncode:
            raise DemoFailed(f"the demo stopped: {shown!r} ended with exit code {done.returncode}")


def majority_share(path: Path) -> float:
    """Returns the share of the most frequent label: what a constant answer would reach."""
    labels = [row["label"] for row in _read_tsv(path)]
    return max(map(labels.count, set(labels))) / len(labels)


def _read_tsv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
