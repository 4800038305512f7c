"""S1, C3, C4: files that do harm, belong elsewhere, or are not what they should be, at every option that takes one."""

from __future__ import annotations

import contextlib
import gzip
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import commands, runs
from tencentpretrain.reliability.commands import OPENED, WRITTEN
from tencentpretrain.reliability.payloads import FAMILIES, careless
from tencentpretrain.reliability.row import Row, Scale

_TEXTS = ("corpus_path", "test_path", "vocab_path")
_ENDS = ("_path", "_map", "_config", "_dir", "_file", "_folder", "record", "page")


@ROWS.register("S1")
def check_pickles(scale: Scale, folder: Path) -> Row:
    """Files that run code, at every option that takes a word; those whose file is opened must be refused by name."""
    world = commands.world()
    mark = folder / "executed"
    files = {}
    for number, (name, make) in enumerate(FAMILIES.items()):
        files[name] = folder / f"payload-{number}.bin"
        files[name].write_bytes(make(str(mark)))
    dead = [name for name, path in files.items() if not _runs(path, mark)]
    executed = refused = opened = tried = as_text = 0
    wrong = [f"{name} would not run anyway" for name in dead]
    options = commands.word_options()
    wrong += _unclassified(options)
    for command, names in options.items():
        for number, option in enumerate(names):
            chosen = list(files.items())
            if scale == "ci":  # another family for each option, so that all are used
                chosen = [chosen[number % len(chosen)]] if option in OPENED.get(command, ()) else []
            outcomes = world.try_each(command, option, [str(path) for _, path in chosen]) if chosen else []
            tried += len(outcomes)
            if mark.exists():
                executed += 1
                wrong.append(f"{command} --{option} ran a payload")
                mark.rmdir()
            for (family, path), outcome in zip(chosen, outcomes, strict=True):
                if option not in OPENED.get(command, ()):
                    continue
                if outcome.status == 0 and option in _TEXTS and path.read_bytes().isascii():
                    as_text += 1  # a pickle of printable letters is a text like any other
                    continue
                opened += 1
                good = outcome.status in (2, 3, 4) and path.name in outcome.text
                refused += good
                wrong += [] if good else [f"{command} --{option}, {family}: {outcome.status} {outcome.text[-200:]}"]
    pairs = sum(map(len, options.values()))
    return Row(
        name="S1",
        promised="malicious pickles, 15 families, at every option that takes a file: refused, file named, 0 executions",
        reached=(
            f"{executed} executions in {tried} commands: {len(files)} families, "
            f"{pairs if scale == 'full' else sum(map(len, OPENED.values()))} options of {len(options)} commands; "
            f"{refused}/{opened} refused by name where the file is opened, "
            f"{as_text} read as the plain text they are" + "".join(f"; {text}" for text in wrong[:4])
        ),
        passed=not wrong and executed == 0 and refused == opened,
    )


def _runs(path: Path, mark: Path) -> bool:
    """Whether a careless reader runs the payload; nothing of it stays."""

    def work() -> bool:
        with contextlib.suppress(Exception):
            careless(path)
        return mark.exists()

    ran = bool(runs.in_child(work))
    if mark.exists():
        mark.rmdir()
    return ran


def _unclassified(options: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Options that sound like a file, but of which nobody has said whether it is read or written."""
    known = {"dev_dataset_path", "resume_from_checkpoint", *WRITTEN}
    return [
        f"{command} --{option} is a new option for a file: put it into OPENED or WRITTEN"
        for command, names in options.items()
        if command != "explain-config"
        for option in names
        if option.endswith(_ENDS) and option not in OPENED.get(command, frozenset()) | known
    ]


def _lfs(path: Path) -> None:
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee50593a9640e0\nsize 9\n"
    )


def _html(path: Path) -> None:
    path.write_text("<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>404</body></html>\n")


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello " * 50)


_KINDS: Mapping[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (lambda path: None, ("no such", "not exist", "there is no", "not found", "missing", "cannot")),
    "directory": (Path.mkdir, ("director", "folder", "no data set", "not a data set")),
    "git-lfs pointer": (_lfs, ("git-lfs",)),
    "HTML page": (_html, ("HTML",)),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"hello\n" * 50)), ("gzip",)),
    "zip": (_zip, ("zip archive",)),
    "unreadable": (
        lambda path: path.symlink_to(path), ("cannot be read", "symbolic links", "no such", "not exist", "there is no"),
    ),
    "empty": (lambda path: path.write_bytes(b""), ("empty", "no lines", "nothing", "0 bytes")),
}  # fmt: skip
"""By kind: what makes it, and the words of which one must be said."""


@ROWS.register("C4")
def check_paths(scale: Scale, folder: Path) -> Row:
    """Paths that are missing, of another kind, or of another content, at every option whose file is opened."""
    world = commands.world()
    paths = {}
    for name, (make, _) in _KINDS.items():
        paths[name] = folder / f"given-{name.replace(' ', '-')}"
        make(paths[name])
    held = tried = 0
    wrong = []
    for command, options in OPENED.items():
        for number, option in enumerate(sorted(options - {"record", "page"})):
            names = list(paths)
            if scale == "ci":
                names = [names[number % len(names)]]
            outcomes = world.try_each(command, option, [str(paths[name]) for name in names])
            for name, outcome in zip(names, outcomes, strict=True):
                if name == "gzip" and option == "corpus_path":
                    continue  # a corpus may be compressed
                tried += 1
                said = outcome.text
                good = outcome.status in (2, 3, 4, 5) and paths[name].name in said
                good = good and any(word.lower() in said.lower() for word in _KINDS[name][1])
                held += good
                wrong += [] if good else [f"{command} --{option}, {name}: {outcome.status} {said[-160:]!r}"]
    return Row(
        name="C4",
        promised="missing, directory, git-lfs pointer, HTML, gz, zip, unreadable, 0 bytes: recognised and named: 100 %",
        reached=f"{held}/{tried} ({len(_KINDS)} kinds, every option whose file is opened)"
        + "".join(f"; {text}" for text in wrong[:6]),
        passed=held == tried,
    )


_CONFIGS: Mapping[str, tuple[object, tuple[str, ...]]] = {
    "bert": (
        {"architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": 768},
        ("Hugging Face config",),
    ),
    "gpt2": (
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12},
        ("Hugging Face config",),
    ),
    "llama": (
        {"architectures": ["LlamaForCausalLM"], "rope_theta": 1e4, "hidden_size": 64},
        ("Hugging Face config",),
    ),
    "t5": (
        {"architectures": ["T5Model"], "d_model": 512, "model_type": "t5"},
        ("Hugging Face config",),
    ),
    "diffusion": (
        {"_class_name": "UNet", "diffusers_version": "0.2"},
        ("Hugging Face config",),
    ),
    "tokenizer": (
        {"version": "1.0", "model": {"type": "BPE"}, "added_tokens": [], "normalizer": None},
        ("tokenizer.json", "--vocab_path"),
    ),
    "tokenizer config": (
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True},
        ("tokenizer_config.json", "--vocab_path"),
    ),
    "tokenizer config without class": (
        {"model_max_length": 512, "clean_up_tokenization_spaces": True},
        ("tokenizer_config.json",),
    ),
    "special tokens": (
        {"pad_token": "[PAD]", "unk_token": "[UNK]"},
        ("--special_tokens_map",),
    ),
    "index": (
        {"metadata": {"total_size": 1}, "weight_map": {"a": "x.bin"}},
        ("index", "--pretrained_model_path"),
    ),
    "deepspeed zero": (
        {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}},
        ("DeepSpeed", "--deepspeed_config"),
    ),
    "deepspeed batch": (
        {"train_batch_size": 8, "optimizer": {"type": "Adam"}},
        ("DeepSpeed", "--deepspeed_config"),
    ),
    "deepspeed micro": (
        {"train_micro_batch_size_per_gpu": 8},
        ("DeepSpeed", "--deepspeed_config"),
    ),
    "adapter": (
        {"peft_type": "LORA", "r": 8, "lora_alpha": 16},
        ("PEFT", "--use_lora"),
    ),
    "vocabulary": (
        {f"token{number}": number for number in range(200)},
        ("vocabulary", "--vocab_path"),
    ),
    "labels": (
        {"negative": 0, "positive": 1},
        ("labels", "--label2id_path"),
    ),
    "list": (
        [1, 2, 3],
        ("list", "object"),
    ),
}  # fmt: skip
"""Foreign JSON given as --config_path, and the words that tell what it is or where it belongs."""


@ROWS.register("C3")
def check_foreign_configs(scale: Scale, folder: Path) -> Row:
    """Config files of other programs, or of this one at another option."""
    world = commands.world()
    held = 0
    wrong = []
    names = list(_CONFIGS)
    for name in names:
        (folder / f"{name}.json").write_text(json.dumps(_CONFIGS[name][0]))
    model = world.folder / "mlm" / "config.json"
    cases = [("pretrain", "config_path", folder / f"{name}.json", _CONFIGS[name][1]) for name in names]
    cases += [
        ("pretrain", "deepspeed_config", model, ("config.json",)),
        ("pretrain", "deepspeed_config", folder / "bert.json", ("bert.json",)),
        ("pretrain", "pretrained_model_path", model, ("JSON file", "config.json")),
        ("pretrain", "pretrained_model_path", folder / "bert.json", ("Hugging Face config",)),
        ("pretrain", "dataset_path", model, ("config.json",)),
        ("pretrain", "vocab_path", folder / "tokenizer.json", ("tokenizer.json",)),
        ("finetune classifier", "train_path", model, ("config.json",)),
        ("infer classifier", "load_model_path", folder / "index.json", ("index",)),
        ("finetune classifier", "config_path", folder / "bert.json", ("Hugging Face config",)),
        ("generate-lm", "config_path", folder / "deepspeed zero.json", ("DeepSpeed", "--deepspeed_config")),
        ("preprocess", "vocab_path", folder / "vocabulary.json", ("vocabulary",)),
    ]
    for command, option, path, words in cases:
        (outcome,) = world.try_each(command, option, [str(path)])
        good = outcome.status in (2, 3, 4) and all(word in outcome.text for word in words)
        held += good
        wrong += [] if good else [f"{command} --{option} {path.name}: {outcome.status} {outcome.text[-160:]!r}"]
    return Row(
        name="C3",
        promised="foreign config in the wrong place: recognised, says where it belongs: 20/20",
        reached=f"{held}/{len(cases)}" + "".join(f"; {text}" for text in wrong[:6]),
        passed=held == len(cases) >= 20,
    )
