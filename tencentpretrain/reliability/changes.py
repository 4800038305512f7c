"""R15, R16: settings, data or tokenizer that are not those of the run that is continued."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

from tencentpretrain.config.cli import part_of
from tencentpretrain.config.export import to_published
from tencentpretrain.config.options import Option, options_of
from tencentpretrain.config.resume_classes import CHECKED_BY_CONTENT, HARMLESS, LAYOUT, MATHS
from tencentpretrain.config.run import PRETRAIN_PARTS, load_run
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs
from tencentpretrain.reliability.row import Row, Scale
from tencentpretrain.train.resume import check_unchanged

_STEPS = 6


@ROWS.register("R15")
def check_settings(scale: Scale, folder: Path) -> Row:
    """Every key of the schema with another value."""
    flags = [*runs.prepare("mlm", folder, _STEPS, 3, lines=60), "--num_workers", "0"]
    saved = to_published(load_run([*flags, "--output_model_path", "unused"]), run_paths=True)
    keys = {option.key: option for part in map(part_of, PRETRAIN_PARTS) for option in options_of(part)}
    classes = (HARMLESS, CHECKED_BY_CONTENT, LAYOUT, MATHS)
    wrong = []
    for key, option in keys.items():
        if sum(key in members for members in classes) != 1:
            wrong.append(f"{key} is in {sum(key in members for members in classes)} classes")
            continue
        changed = {**saved, key: _other(option, saved.get(key))}
        said = _compared(saved, changed, ())
        through = not isinstance(said, str) and any(text.startswith(f"{key}: ") for text in said)
        refused = isinstance(said, str) and f"{key}: was" in said and "--allow_change" in said
        allowed = not isinstance(_compared(saved, changed, (key,)), str)
        if not allowed or (key in MATHS) != refused or (key in MATHS) == through:
            wrong.append(f"{key}: {said}")
    output = folder / "model"
    runs.train_alone(flags, output, "--total_steps", "3")
    extend = ["--allow_change", "total_steps"]
    codes = [
        runs.train(flags, output, "--allow_change", "seed"),
        runs.train(flags, output, *extend, "--learning_rate", "0.5"),
        runs.train(flags, output, *extend, "--report_steps", "2", "--log_level", "DEBUG"),
    ]
    return Row(
        name="R15",
        promised="each key of the schema has a class: harmless goes on, maths is refused unless allowed: 100 %",
        reached=(
            f"{len(keys) - len(wrong)}/{len(keys)} keys ({len(MATHS & set(keys))} refused unless allowed, others let "
            f"through); whole commands end with {', '.join(map(str, codes))} (promised 2, 2, 0)"
            + "".join(f"; {text}" for text in wrong[:3])
        ),
        passed=not wrong and codes == [2, 2, 0],
    )


def _other(option: Option, value: Any) -> Any:
    """Another value of the option's type."""
    if option.many:
        return [*(value or []), "x"]
    if option.base is bool:
        return not value
    if option.base in (int, float):
        return (value or 0) + 1
    return {**(value or {}), "x": 1} if option.base is dict else f"{value or ''}x"


def _compared(saved: dict[str, Any], current: dict[str, Any], allowed: tuple[str, ...]) -> list[str] | str:
    try:
        return check_unchanged(Path("step"), saved, current, allowed)
    except ConfigError as error:
        return str(error)


@ROWS.register("R16")
def check_data(scale: Scale, folder: Path) -> Row:
    """One byte of each file of the data set, another data set, another tokenizer; moved files are no change."""
    flips = 12 if scale == "full" else 1
    draw = random.Random(16)
    flags = [*runs.prepare("lm", folder, _STEPS, 3, lines=80), "--num_workers", "0"]
    runs.train_alone(flags, folder / "alone", "--total_steps", "3", "--save_checkpoint_steps", "3")
    store, vocabulary = folder / "store", folder / "vocab.txt"
    held, cases = 0, 0
    wrong: list[str] = []

    def resume(name: str, expected: int, words: tuple[str, ...], *more: str) -> None:
        nonlocal held, cases
        output = folder / f"resumed-{cases}"
        runs.copy_run(folder / "alone", output)
        status = runs.train(flags, output, "--allow_change", "total_steps", *more)
        said = runs.log_of(output).read_text(encoding="utf-8")
        good = status == expected and all(word in said for word in words)
        good = good and (expected == 0) == Path(f"{output}-{_STEPS}").exists()
        held, cases = held + good, cases + 1
        wrong.extend([] if good else [f"{name}: exit code {status}: {said.strip().splitlines()[-1:]}"])

    for file in sorted(store.iterdir()):
        content = file.read_bytes()
        for _ in range(flips if content else 0):
            place = draw.randrange(len(content))
            harmed = bytearray(content)
            harmed[place] ^= 1 << draw.randrange(8)
            file.write_bytes(harmed)
            # A changed header may be no JSON any more; the other files say both checksums.
            resume(f"{file.name} byte {place}", 3, (file.name, *(("expected",) if file.suffix != ".json" else ())))
        file.write_bytes(content)

    def lines(name: str, *changed: tuple[int, str]) -> Path:
        texts = vocabulary.read_text().splitlines()
        for place, text in changed:
            texts[place] = text
        (folder / name).write_text("\n".join(texts) + "\n")
        return folder / name

    others = {
        "two tokens swapped": lines("swapped.txt", (60, "word16"), (61, "word15")),
        "a token renamed": lines("renamed.txt", (60, "word-x")),
        "a token more": lines("longer.txt", (-1, "word299\nword300")),
    }
    for name, other in others.items():
        resume(name, 3, ("tokenizer", other.name, vocabulary.name), "--vocab_path", str(other))
    for name, tokens in (
        ("another data set", vocabulary),
        ("a data set of another tokenizer", others["a token renamed"]),
    ):
        text = (folder / "corpus.txt").read_text()
        (folder / "other.txt").write_text(text.replace("word17", "word18", 1) if tokens == vocabulary else text)
        other_store = folder / f"other-{tokens.stem}"
        source = [
            "--corpus_path",
            str(folder / "other.txt"),
            "--dataset_path",
            str(other_store),
            "--data_processor",
            "lm",
        ]
        runs.run(runs.command("preprocess"), [*source, "--vocab_path", str(tokens)], folder / "other-log.txt")
        words = ("dataset_path has changed", "fingerprint", "expected") if tokens == vocabulary else ("tokenizer",)
        resume(name, 3, words, "--dataset_path", str(other_store))
        if tokens != vocabulary:
            shutil.copytree(other_store, folder / "other-dev")
            both = [
                "--dataset_path",
                str(other_store),
                "--dev_dataset_path",
                str(folder / "other-dev"),
                "--vocab_path",
                str(tokens),
            ]
            resume(f"{name}, with it", 3, ("has changed", "fingerprint"), *both)
    moved = folder / "moved"
    shutil.copytree(store, moved / "store")
    shutil.copy(vocabulary, moved / "words.txt")
    resume("moved", 0, (), "--dataset_path", str(moved / "store"), "--vocab_path", str(moved / "words.txt"))
    return Row(
        name="R16",
        promised="one byte of the store changed, other tokenizer: refused, naming file and fingerprint: 100 %",
        reached=f"{held}/{cases}, {flips} flips per file; moved files go on"
        + "".join(f"; {text}" for text in wrong[:4]),
        passed=held == cases,
    )
