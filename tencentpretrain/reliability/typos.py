"""C1: keys and flags with one wrong letter, wrong case, hyphens or nesting are answered with the right one."""

from __future__ import annotations

import json
import random
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tencentpretrain.config.cli import part_of
from tencentpretrain.config.options import Option, options_by_spelling
from tencentpretrain.config.run import PRETRAIN_PARTS, load_run
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability.row import Row, Scale

_SHARE = 0.99
_SECONDS = 2.0
_LETTERS = string.ascii_lowercase + "_"


@ROWS.register("C1")
def check_typos(scale: Scale, folder: Path) -> Row:
    """Each key and each flag with every kind of one-edit error."""
    options = options_by_spelling(map(part_of, PRETRAIN_PARTS))
    flags = sorted(name for name, option in options.items() if option.flag)
    draw = random.Random(1)
    words = flags if scale == "full" else draw.sample(flags, 24)
    each = 6 if scale == "full" else 1
    base = {"output_model_path": "x", "vocab_path": "v", "dataset_path": "d"}
    mutants = [(word, wrong) for word in words for wrong in sorted(_mutants(word, draw, each) - set(options))]
    right = {"key": 0, "flag": 0}
    total = {"key": 0, "flag": 0}
    silent: list[str] = []
    for word, wrong in mutants:
        said = _said_of_flag(wrong, folder)
        if said is not None:  # an abbreviation is no error
            total["flag"] += 1
            right["flag"] += _suggests(said, wrong, word, options)
        said = _said_of_key(wrong, folder, base)
        total["key"] += 1
        right["key"] += said is not None and _suggests(said, wrong, word, options)
        if said is None:
            silent.append(wrong)
    nested = _nested(folder)
    seconds, heavy = _quick(folder)
    count = sum(total.values())
    share = sum(right.values()) / max(count, 1)
    return Row(
        name="C1",
        promised=(
            "typos in keys and flags: right suggestion first in >= 99 % of > 5,000 mutants; key path, file and line; "
            "exit code 2, within 2 s, before torch"
        ),
        reached=(
            f"{share:.2%} of {count:,} mutants ({right['key']:,}/{total['key']:,} keys, {right['flag']:,}/"
            f"{total['flag']:,} flags) of {len(words)} settings; wrong "
            f"nesting {'not ' if nested else ''}named; {seconds:.2f} s"
            + ("" if heavy == "2" else f"; exit code and heavy imports: {heavy}")
            + (f"; {len(silent)} keys taken in silence: {silent[:3]}" if silent else "")
        ),
        # A loaded machine may take longer; a full run is made on a quiet one.
        passed=share >= _SHARE and not silent and nested == 0 and heavy == "2"
        and (scale == "ci" or (count > 5000 and seconds <= _SECONDS)),
    )  # fmt: skip


def _mutants(word: str, draw: random.Random, each: int) -> set[str]:
    """Words one edit away: a letter lost, added, replaced, two swapped; other case, hyphens, no underscore."""
    found = {word.upper(), word.capitalize(), word.replace("_", "-"), word.replace("_", "")}
    for _ in range(each):
        i, letter = draw.randrange(len(word)), draw.choice(_LETTERS)
        found |= {word[:i] + word[i + 1 :], word[:i] + letter + word[i:], word[:i] + letter + word[i + 1 :]}
        found.add(word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :])
    return {wrong for wrong in found if wrong and not wrong.startswith("_")}


def _said_of_flag(wrong: str, folder: Path) -> str | None:
    """What `pretrain` says of a wrong flag; None where it understands it as an abbreviation."""
    try:
        load_run(["--output_model_path", "x", f"--{wrong}", "1"])
    except ConfigError as error:
        found = [line for line in str(error).splitlines() if line.strip().startswith(f"--{wrong}")]
        return next((line for line in found if "unknown" in line), None)
    return None


def _said_of_key(wrong: str, folder: Path, base: dict[str, str]) -> str | None:
    """What `pretrain` says of a wrong key of its JSON file, if it names line and key."""
    path = folder / "config.json"
    path.write_text(json.dumps({**base, wrong: 1}, indent=1))
    try:
        load_run(["--config_path", str(path)])
    except ConfigError as error:
        line = f"(line {len(base) + 2})"
        return next((text for text in str(error).splitlines() if wrong in text and line in text), None)
    return None


def _suggests(said: str, wrong: str, word: str, options: dict[str, Option]) -> bool:
    near = said.rpartition("did you mean '")[2].partition("'")[0].lstrip("-")
    return near in options and options[near].key == options[word].key


def _nested(folder: Path) -> int:
    """How many wrong nestings are not named with path, line and what must be there."""
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"optimizer": {"learning_rate": 1}}, ("optimizer (line 2)", "must be a string")),
        ({"model": {"hidden_size": 64}}, ("model (line 2)", "hidden_size", "top of the file")),
        ({"training": {"batch_size": 4, "seed": 1}}, ("training (line 2)", "batch_size, seed", "top of the file")),
        ({"stream_0": {"hiden_size": 1}, "stream_1": {}}, ("stream_0.hiden_size", "did you mean 'hidden_size'")),
        ({"embedding": {"word": True}}, ("embedding (line 2)", "must be a list")),
        ({"seed": [7]}, ("seed (line 2)", "must be an integer")),
    ]
    named = 0
    for values, words in cases:
        path = folder / "nested.json"
        path.write_text(json.dumps(values, indent=1))
        try:
            load_run(["--config_path", str(path), "--output_model_path", "x"])
        except ConfigError as error:
            named += all(word in str(error) for word in words)
    return len(cases) - named


def _quick(folder: Path) -> tuple[float, str]:
    """Starts the command anew with a wrong flag; returns its seconds, and its exit code with what it imported."""
    code = (
        "import sys; from tencentpretrain.entry.pretrain import main; status = main(['--batch_sizes', '3']); "
        "print(status, *sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return time.monotonic() - began, ended.stdout.strip()
