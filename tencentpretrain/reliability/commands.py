"""Every command with arguments that work, and every option of it that takes a word: where a wrong file can be given."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import random
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tencentpretrain.errors import ResourceError
from tencentpretrain.reliability import runs

_OPTION = re.compile(r"^ {2}(?:-\w, )?--(\w+) (\w+)", re.MULTILINE)
_NUMBERS = ("INT", "NUMBER", "STEPS", "KILLS", "SAVE_STEPS", "SEED")
_TASKS = {"finetune": "finetune classifier", "infer": "infer classifier"}

OPENED: Mapping[str, frozenset[str]] = {
    "preprocess": frozenset({
        "config_path", "corpus_path", "vocab_path", "merges_path", "spm_model_path", "special_tokens_map",
        "tgt_vocab_path", "tgt_merges_path", "tgt_spm_model_path", "tgt_special_tokens_map",
    }),
    "pretrain": frozenset({
        "config_path", "dataset_path", "dev_dataset_path", "vocab_path", "merges_path", "spm_model_path",
        "special_tokens_map", "tgt_vocab_path", "tgt_merges_path", "tgt_spm_model_path", "tgt_special_tokens_map",
        "pretrained_model_path", "lora_pretrained_model_path", "deepspeed_config",
    }),
    "finetune classifier": frozenset({
        "config_path", "train_path", "dev_path", "test_path", "vocab_path", "merges_path", "spm_model_path",
        "special_tokens_map", "pretrained_model_path",
    }),
    "infer classifier": frozenset({
        "config_path", "load_model_path", "test_path", "vocab_path", "merges_path", "spm_model_path",
        "special_tokens_map",
    }),
    "generate-lm": frozenset({
        "config_path", "load_model_path", "test_path", "vocab_path", "merges_path", "spm_model_path",
        "special_tokens_map",
    }),
    "build-vocab": frozenset({"corpus_path"}),
    "explain-config": frozenset({"config_path"}),
    "reliability": frozenset({"record", "page"}),
    "plan": frozenset({"config_path", "deepspeed_config"}),
    "check-parity": frozenset(),
}  # fmt: skip
"""By command, the options whose file it opens when it is given `SWITCHES` with them."""

WRITTEN = frozenset(
    {"output_model_path", "log_path", "prediction_path", "output_path", "output_dir", "merges_path", "dataset_path"}
)
"""Options that name what is written, in commands where they are not among OPENED."""

_TGT = ("tgt_vocab_path", "tgt_merges_path", "tgt_spm_model_path", "tgt_special_tokens_map")
SWITCHES: Mapping[str, tuple[str, ...]] = {
    "merges_path": ("--tokenizer", "bpe"),
    "spm_model_path": ("--tokenizer", "xlmroberta"),
    "tgt_merges_path": ("--tgt_tokenizer", "bpe"),
    "tgt_spm_model_path": ("--tgt_tokenizer", "xlmroberta"),
    "lora_pretrained_model_path": ("--use_lora",),
    "deepspeed_config": ("--deepspeed",),
}
"""What must be said too so that an option's file is opened."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended, and what it said."""

    status: int
    text: str


class World:
    """A folder in which every command works.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objectives = {name: runs.prepare(name, folder / name, 2, 2, lines=60) for name in ("mlm", "mt", "lm")}
        runs.train_alone([*self.objectives["lm"], "--num_workers", "0"], folder / "gpt")
        self._tables()
        classifier = self.arguments("finetune classifier", "")
        log = folder / "classifier.txt"
        if runs.run(runs.command("main"), ["finetune", "classifier", *classifier], log):
            raise ResourceError(f"fine-tuning failed:\n{log.read_text(encoding='utf-8')}")
        (folder / "classifier-output").rename(folder / "classifier")

    def arguments(self, command: str, option: str) -> list[str]:
        """Returns arguments with which a command works, in a form that opens the file of `option`."""
        folder = self.folder
        objective = "mt" if option in _TGT else "mlm"
        data, model = folder / objective, folder / "mlm"
        common = ["--config_path", str(model / "config.json"), "--vocab_path", str(model / "vocab.txt")]
        tables = {f"--{name}_path": str(folder / f"{name}.tsv") for name in ("train", "dev", "test")}
        words: dict[str, list[str]] = {
            "preprocess": [
                "--corpus_path", str(data / "corpus.txt"), "--dataset_path", str(folder / "new-store"), "--overwrite",
                *self.objectives[objective][2 : self.objectives[objective].index("--config_path")],
            ],
            "pretrain": [
                *self.objectives[objective], "--num_workers", "0", "--no-resume",
                "--output_model_path", str(folder / "model"),
            ],
            "finetune classifier": [
                *common, *(word for pair in tables.items() for word in pair), "--epochs_num", "1", "--seq_length", "16",
                "--output_model_path", str(folder / "classifier-output"), "--device", "cpu", "--batch_size", "8",
            ],
            "infer classifier": [
                *common, "--load_model_path", str(folder / "classifier"), "--test_path", tables["--test_path"],
                "--prediction_path", str(folder / "predictions.tsv"), "--labels_num", "2", "--seq_length", "16",
                "--device", "cpu",
            ],
            "generate-lm": [
                "--config_path", str(folder / "lm" / "config.json"), "--vocab_path", str(folder / "lm" / "vocab.txt"),
                "--load_model_path", str(folder / "gpt-2"), "--test_path", str(folder / "prompts.txt"),
                "--prediction_path", str(folder / "generated.txt"), "--seq_length", "16",
            ],
            "build-vocab": [
                "--corpus_path", str(folder / "prompts.txt"), "--output_path", str(folder / "new-vocab.txt"),
                "--delimiter", "space",
            ],
            "explain-config": self.objectives["mlm"] + ["--output_model_path", "x"],
            "plan": ["--config_path", str(model / "config.json"), "--vocab_path", str(model / "vocab.txt")],
            "check-parity": [str(folder / "no-records")],
            "reliability": ["--rows", "C1", "--record", str(folder / "figures.json")],
        }  # fmt: skip
        found = words.get(command, [])
        if option == "merges_path" and command != "build-vocab":
            found = [*found, "--vocab_path", str(folder / "bpe.txt")]
        if option == "tgt_merges_path":
            found = [*found, "--tgt_vocab_path", str(folder / "bpe.txt")]
        return [*found, *(SWITCHES.get(option, ()) if command != "build-vocab" else ())]

    def try_each(self, command: str, option: str, values: Sequence[str]) -> list[Outcome]:
        """Gives an option one value after the other, in one child; a later value replaces an earlier one."""
        spoken = [*command.split(), *self.arguments(command, option)]
        log = self.folder / "spoken.txt"

        def work() -> list[list[int | str]]:
            found: list[list[int | str]] = []
            os.chdir(self.folder)
            main = runs.command("main")
            descriptor = os.open(log, os.O_RDWR | os.O_CREAT, 0o644)
            runs.speak_into(descriptor)
            for value in values:
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                status = main([*spoken, f"--{option}", value] if option else [*spoken, value])
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                found.append([status, log.read_text(encoding="utf-8", errors="replace")])
            return found

        return [Outcome(status=int(status), text=str(text)) for status, text in runs.in_child(work)]

    def _tables(self) -> None:
        draw = random.Random(2)
        words = [line for line in (self.folder / "mlm" / "vocab.txt").read_text().splitlines() if line[:4] == "word"]
        for name in ("train", "dev", "test"):
            rows = [f"{number % 2}\t{' '.join(draw.choices(words, k=6))}" for number in range(16)]
            (self.folder / f"{name}.tsv").write_text("\n".join(["label\ttext_a", *rows]) + "\n")
        (self.folder / "prompts.txt").write_text("\n".join(" ".join(draw.choices(words, k=4)) for _ in range(8)) + "\n")
        letters = [chr(number) for number in (*range(33, 127), *range(161, 173), *range(174, 324))]
        tokens = ["<|endoftext|>", *letters]
        (self.folder / "bpe.txt").write_text("\n".join(tokens) + "\n")


@functools.cache
def world() -> World:
    """Returns the world of this process, made at the first call and removed at the end of the process."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="reliability-world-"))
    return World(Path(_KEPT[0].name))


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def word_options() -> dict[str, tuple[str, ...]]:
    """Returns by command every option that takes a word, read from the help: a path, a name, or whatever."""
    available = importlib.import_module("tencentpretrain.entry.main").available()
    names = [_TASKS.get(name, name) for name in available]
    return {name: tuple(runs.in_child(lambda name=name: _options_of(name))) for name in names}  # type: ignore[misc]


def _options_of(command: str) -> list[str]:
    spoken = io.StringIO()
    with contextlib.redirect_stdout(spoken), contextlib.redirect_stderr(spoken):
        runs.command("main")([*command.split(), "--help"])
    return [name for name, kind in _OPTION.findall(spoken.getvalue()) if kind not in _NUMBERS]
