"""Small runs to do harm to: their data, the commands in forked processes, and the comparison of their ends."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tencentpretrain.errors import ResourceError
from tencentpretrain.registry import PROCESSORS
from tencentpretrain.train.metrics import MetricsFile

Command = Callable[[Sequence[str]], int]

SEQ_LENGTH = 32
_WORDS = tuple(f"word{number}" for number in range(300))
_SENTINELS = 40
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"<extra_id_{number}>" for number in range(_SENTINELS)))
_SIZES: Mapping[str, Any] = {
    "emb_size": 32, "hidden_size": 32, "feedforward_size": 64, "heads_num": 2, "layers_num": 2, "hidden_act": "gelu",
    "max_seq_length": 64, "dropout": 0.1, "embedding": ["word", "pos"], "encoder": "transformer",
    "mask": "fully_visible",
}  # fmt: skip
_DECODER: Mapping[str, Any] = {
    "target": ["lm"], "decoder": "transformer", "decoder_layers_num": 2, "tgt_embedding": ["word", "pos"],
    "share_embedding": True,
}  # fmt: skip
_SENTENCES = {"target": ["mlm", "sp"], "embedding": ["word", "pos", "seg"]}
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "bert": _SENTENCES,
    "mlm": {"target": ["mlm"], "tie_weights": True},
    "lm": {"mask": "causal", "target": ["lm"]},
    "bilm": {"encoder": "bilstm", "embedding": ["word"], "target": ["bilm"]},
    "albert": {
        **_SENTENCES, "emb_size": 16, "factorized_embedding_parameterization": True, "parameter_sharing": True,
    },
    "mt": {**_DECODER, "share_embedding": False},
    "t5": _DECODER,
    "cls": {"target": ["cls"], "labels_num": 2, "embedding": ["word", "pos", "seg"]},
    "prefixlm": {"mask": "causal_with_prefix", "target": ["lm"]},
    "gsg": _DECODER,
    "bart": _DECODER,
    "cls_mlm": {"target": ["mlm", "cls"], "labels_num": 2, "embedding": ["word", "pos", "seg"]},
    "llm_pretrain": {"mask": "causal", "target": ["lm"]},
    "llm_sft": {"mask": "causal", "target": ["lm"], "prefix_lm_loss": True},
}  # fmt: skip
"""Two-layer models by data processor: every processor of text."""


def command(name: str) -> Command:
    """Returns a command as its script starts it.

    It is found by name as the console script finds it, because the package below `entry` imports no entry.
    """
    found: Command = importlib.import_module(f"tencentpretrain.entry.{name}").main
    return found


def warm_up() -> None:
    """Imports all that a run needs, so that every fork of this process starts at once."""
    late = ("torch._dynamo", "matplotlib.backends.backend_agg", "matplotlib.figure")  # imported at first use
    for name in ("tencentpretrain.train.pretraining", "tencentpretrain.data.build", *late):
        importlib.import_module(name)


def prepare(
    objective: str,
    folder: Path,
    steps: int,
    save_steps: int,
    *,
    lines: int = 400,
    longest: int = 60,
    batch_size: int = 4,
) -> list[str]:
    """Writes a random corpus, its vocabulary, store and a config; returns the flags that all runs share.

    Args:
        objective: a key of OBJECTIVES.
        folder: made if it is not there.
        steps, save_steps: length of a run and distance of its checkpoints.
        lines: records (documents for objectives that read sentences).
        longest: words of the longest line.
    """
    warm_up()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*_SPECIAL, *_WORDS]) + "\n")
    (folder / "corpus.txt").write_text(_corpus(PROCESSORS.get(objective).record_format, lines, longest))
    (folder / "config.json").write_text(json.dumps({**_SIZES, **OBJECTIVES[objective]}))
    data = [
        "--dataset_path", str(folder / "store"), "--vocab_path", str(folder / "vocab.txt"),
        "--data_processor", objective, "--seq_length", str(SEQ_LENGTH), "--tgt_seq_length", str(SEQ_LENGTH),
    ]  # fmt: skip
    if objective == "mt":
        (folder / "tgt_vocab.txt").write_text("\n".join([*_SPECIAL, *reversed(_WORDS)]) + "\n")
        data += ["--tgt_vocab_path", str(folder / "tgt_vocab.txt")]
    log = folder / "preprocess.txt"
    if run(command("preprocess"), ["--corpus_path", str(folder / "corpus.txt"), *data], log):
        raise ResourceError(f"preprocessing failed:\n{log.read_text()}")
    shutil.copytree(folder / "store", folder / "dev-store")
    return [
        *data, "--config_path", str(folder / "config.json"), "--total_steps", str(steps),
        "--batch_size", str(batch_size), "--save_checkpoint_steps", str(save_steps), "--report_steps", "3",
        "--learning_rate", "0.001", "--dev_dataset_path", str(folder / "dev-store"), "--eval_batches", "2",
        "--device", "cpu", "--threads", "1", "--max_grad_norm", "1.0",
    ]  # fmt: skip


def _corpus(record_format: str, lines: int, longest: int) -> str:
    draw = random.Random(0)

    def sentence(most: int = longest) -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(min(5, most), most)))

    if record_format == "sentences":
        documents = ("\n".join(sentence(15) for _ in range(draw.randint(2, 8))) for _ in range(lines // 4))
        return "\n\n".join(documents) + "\n"
    make: Mapping[str, Callable[[], str]] = {
        "lines": sentence,
        "json_lines": lambda: json.dumps({"text": sentence()}),
        "tsv_pairs": lambda: f"{sentence(12)}\t{sentence(12)}",
        "labelled": lambda: f"{draw.randint(0, 1)}\t{sentence(12)}",
        "instructions": lambda: json.dumps({"instruction": sentence(8), "input": "", "output": sentence(12)}),
    }
    return "\n".join(make[record_format]() for _ in range(lines)) + "\n"


def start(function: Command, arguments: Sequence[str], log: Path) -> int:
    """Runs a command in a child of this process, which has imported all it needs; returns its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        speak_into(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
        status = function(list(arguments))
    finally:
        os._exit(status)


def speak_into(descriptor: int) -> None:
    """Sends all that this process says into an open file, also where its own streams had been replaced."""
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))


def run(function: Command, arguments: Sequence[str], log: Path) -> int:
    """Runs a command in a child to its end; returns its exit code, or minus the signal that ended it."""
    return wait(start(function, arguments, log))


def wait(process: int, kill_after: float | None = None) -> int:
    """Waits for a child, killing it after some seconds; returns its exit code, or minus the signal that ended it."""
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while deadline is not None and time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    if deadline is not None:
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def train(flags: Sequence[str], output: Path, *more: str) -> int:
    """Runs `pretrain` in a child; its words are in `<output>.txt`. Returns its exit code."""
    return run(command("pretrain"), [*flags, "--output_model_path", str(output), *more], log_of(output))


def train_alone(flags: Sequence[str], output: Path, *more: str) -> None:
    """Runs `pretrain` in a child to a good end."""
    if train(flags, output, *more):
        raise ResourceError(f"the run left alone failed:\n{log_of(output).read_text()}")


def log_of(output: Path) -> Path:
    """Where the words of a run are."""
    return Path(f"{output}.txt")


def checkpoints_of(output: Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(f"{output}.run") / "checkpoints"


def reported_step(output: Path) -> int:
    """The last step in a run's metrics; 0 before the first."""
    records = MetricsFile(Path(f"{output}.run") / "metrics.jsonl").records()
    return max((int(record["step"]) for record in records), default=0)


def wait_for_step(output: Path, step: int, process: int, most: float = 300.0) -> None:
    """Returns when a run has reported a step, or has ended."""
    deadline = time.monotonic() + most
    while reported_step(output) < step and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        time.sleep(0.004)


def copy_run(output: Path, copy: Path) -> None:
    """Copies the folder of a run, as it would be found after a crash."""
    shutil.copytree(f"{output}.run", f"{copy}.run")


def differences(alone: Path, other: Path, steps: int) -> list[str]:
    """Compares weights, optimizer and metrics of two finished runs byte for byte; times are left out."""
    found = []
    name = f"step-{steps:08d}"
    ours, theirs = checkpoints_of(alone) / name, checkpoints_of(other) / name
    pairs = [(Path(f"{alone}-{steps}"), Path(f"{other}-{steps}"))]
    tensors = sorted(file.name for file in ours.glob("*.safetensors"))
    if len(tensors) < 2:
        found.append(f"{ours} lacks tensors")
    pairs += [(ours / file, theirs / file) for file in tensors]
    for mine, its in pairs:
        if not its.is_file() or mine.read_bytes() != its.read_bytes():
            found.append(f"{its} differs from {mine}")
    if timeless_metrics(alone) != timeless_metrics(other):
        found.append(f"{other}.run/metrics.jsonl differs")
    return found


def timeless_metrics(output: Path) -> list[dict[str, Any]]:
    """The records of a run without their times; every line must be whole."""
    lines = Path(f"{output}.run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "timing"} for line in lines]


def in_child(work: Callable[[], Any]) -> Any:
    """Returns the JSON value that `work` gives in a child of this process, whose numbers and modules stay untouched.

    Raises:
        ResourceError: it failed; with its error.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.close(reading)
            try:
                content = {"value": work()}
            except Exception as error:
                content = {"error": f"{type(error).__name__}: {error}"}
            with os.fdopen(writing, "w") as file:
                json.dump(content, file)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    status = wait(process)
    content = json.loads(text) if text else {"error": f"it ended with {status}"}
    if "error" in content:
        raise ResourceError(content["error"])
    return content["value"]
