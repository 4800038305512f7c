"""What `scripts/plan_accuracy.py` runs: real training processes, their peak memory, and what the plan said."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tencentpretrain.entry.run import run_main
from tencentpretrain.errors import ResourceError

MIB = 1 << 20
UPDATES = 2
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>")
_BERT: dict[str, Any] = {
    "embedding": ["word", "pos", "seg"],
    "encoder": "transformer",
    "mask": "fully_visible",
    "hidden_act": "gelu",
}
_BERT |= {"dropout": 0.1, "max_seq_length": 1024, "target": ["mlm"], "data_processor": "mlm"}
_GPT2: dict[str, Any] = {
    **_BERT,
    "embedding": ["word", "pos"],
    "mask": "causal",
    "hidden_act": "gelu_fast",
    "target": ["lm"],
}
_GPT2 |= {"data_processor": "lm", "remove_embedding_layernorm": True, "layernorm_positioning": "pre"}
_GPT2 |= {"tie_weights": True}
_LLAMA: dict[str, Any] = {**_GPT2, "embedding": ["word"], "hidden_act": "silu", "dropout": 0.0, "feed_forward": "gated"}
_LLAMA |= {"rotary_position_embedding": True, "layernorm": "rms", "remove_transformer_bias": True, "tie_weights": False}
_T5: dict[str, Any] = {
    **_BERT,
    "embedding": ["word"],
    "tgt_embedding": ["word"],
    "hidden_act": "relu",
    "decoder": "transformer",
}
_T5 |= {"relative_position_embedding": True, "remove_embedding_layernorm": True, "share_embedding": True}
_T5 |= {"layernorm_positioning": "pre", "remove_attention_scale": True, "layernorm": "t5", "target": ["lm"]}
_T5 |= {"remove_transformer_bias": True, "tie_weights": True, "data_processor": "t5"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run: a model, its sizes, and flags of `pretrain.py`."""

    name: str
    model: Mapping[str, Any]
    width: int
    inner: int
    heads: int
    layers: int
    vocabulary: int
    flags: tuple[str, ...] = ()
    world_size: int = 1

    def config(self) -> dict[str, Any]:
        """Returns the content of the model's file."""
        sizes = {"emb_size": self.width, "hidden_size": self.width, "feedforward_size": self.inner}
        sizes |= {"heads_num": self.heads, "layers_num": self.layers}
        if "decoder" in self.model:
            sizes["decoder_layers_num"] = self.layers
        return {**self.model, **sizes}


def _flags(batch: int, length: int, *others: str) -> tuple[str, ...]:
    return ("--batch_size", str(batch), "--seq_length", str(length), *others)


def _setting(
    name: str, model: Mapping[str, Any], sizes: tuple[int, ...], flags: tuple[str, ...], world: int = 1
) -> Setting:
    width, inner, heads, layers, vocabulary = sizes
    return Setting(name=name, model=model, width=width, inner=inner, heads=heads, layers=layers,
                   vocabulary=vocabulary, flags=flags, world_size=world)  # fmt: skip


SETTINGS = (
    _setting("bert, fp32", _BERT, (256, 1024, 4, 6, 21128), _flags(16, 128)),
    _setting("bert, bf16", _BERT, (256, 1024, 4, 6, 21128), _flags(32, 128, "--bf16")),
    _setting("gpt2, fp32", _GPT2, (256, 1024, 4, 4, 50257), _flags(4, 256)),
    _setting("gpt2, recomputed", _GPT2, (256, 1024, 4, 8, 21128), _flags(8, 256, "--gradient_checkpointing")),
    _setting("llama, fp32", _LLAMA, (256, 1024, 4, 6, 32000), _flags(4, 256)),
    _setting("t5, fp32", _T5, (256, 1024, 4, 4, 32128), _flags(8, 256)),
    _setting("gpt2, batch 1", _GPT2, (512, 2048, 8, 6, 50257), _flags(1, 128)),
    _setting("bert, vocabulary 120000", _BERT, (256, 1024, 4, 2, 120000), _flags(8, 128)),
    _setting("llama, LoRA", _LLAMA, (256, 1024, 4, 6, 32000), _flags(8, 256, "--use_lora")),
    _setting("bert, sequence 512", _BERT, (256, 1024, 4, 3, 21128), _flags(4, 512)),
    _setting("bert, adafactor, 2 micro-steps", _BERT, (256, 1024, 4, 6, 21128),
             _flags(16, 128, "--optimizer", "adafactor", "--accumulation_steps", "2")),
    _setting("gpt2, bf16, 2 micro-steps", _GPT2, (256, 1024, 4, 4, 50257),
             _flags(4, 256, "--bf16", "--accumulation_steps", "2")),
    _setting("t5, adafactor, recomputed", _T5, (256, 1024, 4, 4, 32128),
             _flags(16, 256, "--optimizer", "adafactor", "--gradient_checkpointing")),
    _setting("llama, bf16, sequence 1024", _LLAMA, (256, 688, 4, 4, 32000), _flags(2, 1024, "--bf16")),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every setting; returns the exit code."""
    return run_main(lambda: _measure_all(list(sys.argv[1:] if argv is None else argv)))


def _measure_all(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="plan_accuracy.py", description=__doc__)
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--threads", type=int, default=2, help="threads of each run (default %(default)s)")
    parser.add_argument("--output", help="JSON file of the results")
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for setting in SETTINGS:
            if options.only not in setting.name:
                continue
            row = measure(setting, Path(place), options.threads)
            rows.append(row)
            sizes = f"predicted {row['predicted'] / MIB:7.0f}  measured {row['measured'] / MIB:7.0f} MiB"
            ratios = f"ratio {row['ratio']:.3f}  without the framework {row['ratio_without_framework']:.3f}"
            print(f"{row['name']:<32} {sizes}  {ratios}  at {row['at']}", flush=True)
            if options.output:
                Path(options.output).write_text(json.dumps({"settings": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(setting: Setting, place: Path, threads: int) -> dict[str, Any]:
    """Runs a setting for a few updates and a save; returns its peak beside the predicted one."""
    from tencentpretrain.config.run import load_run
    from tencentpretrain.plan.machine import framework_bytes
    from tencentpretrain.plan.run import as_json, plan_run

    config, vocabulary, store = _prepare(setting, place)
    words = list(setting.flags)
    micro = int(words[words.index("--accumulation_steps") + 1]) if "--accumulation_steps" in words else 1
    flags = ["--config_path", str(config), "--vocab_path", str(vocabulary), "--tokenizer", "space"]
    flags += ["--dataset_path", str(store), "--total_steps", str(UPDATES * micro), "--threads", str(threads)]
    flags += ["--output_model_path", str(place / "run" / setting.name.replace(" ", "_")), "--no-resume"]
    flags += ["--report_steps", "1", *setting.flags]
    plan = as_json(plan_run(load_run(flags), setting.vocabulary))
    peak = _peak(["pretrain", *flags], threads, place / "log.txt")
    predicted, base = plan["memory_per_process"]["total"], framework_bytes()
    return {
        "name": setting.name,
        "flags": list(setting.flags),
        "model": setting.config(),
        "vocabulary": setting.vocabulary,
        "parameters": plan["parameters"]["total"],
        "predicted": predicted,
        "measured": peak,
        "ratio": round(predicted / peak, 4),
        "ratio_without_framework": round((predicted - base) / (peak - base), 4),
        "at": plan["memory_per_process"]["at"],
        "parts": plan["memory_per_process"],
    }


def _prepare(setting: Setting, place: Path) -> tuple[Path, Path, Path]:
    """Writes model file, vocabulary, corpus and data set of a setting."""
    folder = place / setting.name.replace(" ", "_").replace(",", "")
    folder.mkdir()
    config, vocabulary, corpus = folder / "config.json", folder / "vocab.txt", folder / "corpus.txt"
    config.write_text(json.dumps(setting.config()), encoding="utf-8")
    special = [*_SPECIAL, *(f"<extra_id_{number}>" for number in range(100))]
    words = [f"w{number}" for number in range(setting.vocabulary - len(special))]
    vocabulary.write_text("\n".join([*special, *words]) + "\n", encoding="utf-8")
    draw = random.Random(setting.name)
    lines = (" ".join(draw.choices(words, k=4200)) for _ in range(60))
    corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ["preprocess", "--corpus_path", str(corpus), "--vocab_path", str(vocabulary), "--tokenizer", "space"]
    flags += ["--dataset_path", str(folder / "store"), "--data_processor", str(setting.model["data_processor"])]
    _peak(flags, 1, folder / "log.txt")
    return config, vocabulary, folder / "store"


def _peak(command: Sequence[str], threads: int, log: Path) -> int:
    """Runs a command of the package and returns the largest resident set of its process, in bytes.

    Raises:
        ResourceError: it failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("wb") as out:
        words = [sys.executable, "-m", "tencentpretrain", *command]
        process = subprocess.Popen(words, stdout=out, stderr=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise ResourceError(f"{' '.join(command)}: ended with exit code {process.returncode}\n{tail}")
    return int(usage.ru_maxrss) * 1024
