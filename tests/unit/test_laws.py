"""The laws of the architecture, read from the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tencentpretrain"

# Lower layers know nothing of higher ones; members of one layer know nothing of each other.
LAYERS = (
    ("errors",),
    ("registry", "sniff", "faults"),
    ("config",),
    ("plan",),
    ("tokenizers",),
    ("data",),
    ("layers",),
    ("embeddings", "encoders", "decoders", "targets"),
    ("model",),
    ("taps",),
    ("methods",),
    ("optim",),
    ("checkpoint",),
    ("parallel",),
    ("engines",),
    ("train",),
    ("tasks", "generate"),
    ("parity", "demo", "reliability"),
    ("entry",),
    ("__init__", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# A whole run holds the tokenizer's settings, which live with the tokenizers and import nothing heavy.
EXCEPTIONS = {("config", "tencentpretrain.tokenizers.config")}

LONGEST = 400
LONG_FOR_A_REASON = {
    "tencentpretrain/checkpoint/family.py": "one grammar, its two directions and its account are read together",
}


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "tencentpretrain":
                yield from (f"tencentpretrain.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_every_folder_has_a_layer() -> None:
    assert {top(path) for path in package_files()} <= set(RANK), "a new folder needs its place in LAYERS"


def test_imports_run_one_way() -> None:
    wrong = []
    for path in package_files():
        here = top(path)
        for module in imported(path):
            parts = module.split(".")
            if parts[0] != "tencentpretrain" or len(parts) < 2 or parts[1] == here or (here, module) in EXCEPTIONS:
                continue
            if RANK.get(parts[1], len(LAYERS)) >= RANK[here]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_library_imports_no_script() -> None:
    scripts = {"preprocess", "pretrain", "finetune", "inference", "scripts", "tests", "benchmarks"}
    wrong = [f"{path}: {name}" for path in package_files() for name in imported(path) if name.split(".")[0] in scripts]
    assert not wrong, "\n".join(wrong)


def test_settings_and_entries_import_nothing_heavy() -> None:
    modules = ["tencentpretrain"]
    for path in package_files():
        if top(path) in ("errors", "registry", "sniff", "config", "entry"):
            modules.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    code = "\n".join(
        (
            "import importlib, sys",
            f"for name in {modules!r}:",
            "    importlib.import_module(name)",
            "    heavy = {'torch', 'transformers', 'matplotlib', 'deepspeed', 'tokenizers'} & set(sys.modules)",
            "    assert not heavy, f'{name} imports {heavy}'",
        )
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def scripts() -> list[Path]:
    return [*ROOT.glob("*.py"), *(ROOT / "finetune").glob("*.py"), *(ROOT / "inference").glob("*.py"), *(ROOT / "scripts").glob("*.py")]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("path", scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_thin(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60, f"{len(lines)} lines; move the work into the package"
    outside = {name.split(".")[0] for name in imported(path)} - {"tencentpretrain", "__future__", "sys", "pathlib"}
    assert not outside, f"a script only calls an entry, but imports {outside}"


def test_long_files_have_a_reason() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in package_files()
    }
    long = {name: length for name, length in lengths.items() if length > LONGEST and name not in LONG_FOR_A_REASON}
    assert not long, f"cut these in two, or write the reason down in this test: {long}"
    assert set(LONG_FOR_A_REASON) <= set(lengths), "the table names a file that is gone"


def test_no_folder_called_utils() -> None:
    assert not [path for path in package_files() if "utils" in path.parts or path.stem in ("utils", "helpers", "misc")]


def tracked_text() -> Iterator[tuple[Path, str]]:
    names = (
        subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=ROOT, check=False)
        .stdout.decode()
        .split("\0")
    )
    for name in names:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".json", ".txt", ".yml", ".yaml", ".cfg", "") and path.is_file():
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_no_absolute_paths() -> None:
    pattern = re.compile(r"""(?<![\w.:/~}])/(?:home|root|Users|work|mnt|private)/\w""")
    wrong = []
    for path, text in tracked_text():
        if path == Path(__file__):
            continue
        wrong += [f"{path.relative_to(ROOT)}: {match.group()}" for match in pattern.finditer(text)]
    assert not wrong, "\n".join(wrong)


def test_no_unfinished_marks() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b")
    wrong = [
        str(path.relative_to(ROOT))
        for path, text in tracked_text()
        if path.suffix == ".py" and path != Path(__file__) and marks.search(text)
    ]
    assert not wrong, wrong
