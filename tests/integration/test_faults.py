"""Every place that writes has a fault point, and the switch does what it says."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tencentpretrain import faults
from tencentpretrain.data.durable import write_durably
from tencentpretrain.errors import ConfigError, ResourceError

PACKAGE = Path(faults.__file__).parent

WITHOUT_POINTS = {
    "demo": "its outputs are made anew by the same command",
    "parity": "comparisons for developers",
    "reliability": "they inject the faults",
    "faults.py": "the switch itself",
    "entry": "commands that measure; what users keep goes through the library",
}
"""Folders and files of the package whose writes carry nothing that a run needs."""

EXCEPTIONS = {
    ("checkpoint/encoding.py", "put_tensors"): "torch.save writes into an open DurableFile, which has the points",
    ("config/ended.py", "tell_launcher"): "a word for the launcher, whose failure is passed over",
    ("data/cluster.py", "run_on_ray"): "a mark by which machines know the folder as the same; it carries nothing",
    ("data/premises.py", "check_answer"): "the same mark",
    ("engines/spawning.py", "_wait"): "notes of how processes ended, for messages",
    ("train/stacks.py", "open"): "stacks of a hanging process, for people",
    ("train/stacks.py", "close"): "stacks of a hanging process, for people",
}
"""Functions in which an operation has no point of its own, and why."""

_CALLS = {
    "rename", "renames", "unlink", "remove", "rmdir", "fsync", "fdatasync", "ftruncate", "truncate", "rmtree", "pwrite",
    "write_text", "write_bytes", "savefig", "save_file", "symlink_to", "hardlink_to", "tofile", "copytree", "copyfile",
}  # fmt: skip


def _writes(call: ast.Call) -> bool:
    """Whether a call changes what is on the disk."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    owner = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    if name == "remove":
        return owner == "os"
    if name == "truncate":
        return owner in ("os", "file")
    if name == "replace":  # of a path: one argument; of os: two and its name; of a string: two
        return owner == "os" or (len(call.args) == 1 and not call.keywords)
    if name == "rename":
        return owner in ("os", "shutil") or len(call.args) == 1
    if name == "save" and owner == "torch":
        return not (len(call.args) > 1 and isinstance(call.args[1], ast.Name) and call.args[1].id == "file")
    if name == "open":
        values = [argument for argument in [*call.args, *(word.value for word in call.keywords)]]
        modes = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        flags = " ".join(ast.unparse(value) for value in call.args)
        return any(set(mode) & set("wax+") and set(mode) <= set("rwaxbt+") for mode in modes) or "O_CREAT" in flags
    return name in _CALLS and isinstance(function, ast.Attribute)


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
            yield from _own_nodes(child)


def _point(node: ast.AST) -> str | None:
    is_point = (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "faults"
        and node.func.attr in ("reach", "write")
    )
    return str(ast.literal_eval(node.args[0])) if is_point else None  # type: ignore[attr-defined]


def unguarded(source: str, file: str) -> list[str]:
    """Returns the functions with more writing operations than fault points."""
    found = []
    tree = ast.parse(source)
    functions = [
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Module))
    ]
    for function in functions:
        name = getattr(function, "name", "<module>")
        nodes = list(_own_nodes(function))
        operations = [node for node in nodes if isinstance(node, ast.Call) and _writes(node)]
        points = [node for node in nodes if _point(node)]
        if len(operations) > len(points) and (file, name) not in EXCEPTIONS:
            found.append(f"{file}: {name} has {len(operations)} writing operations, {len(points)} fault points")
    return found


def _sources() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE)
        if file.parts[0] not in WITHOUT_POINTS:
            yield file.as_posix(), path.read_text(encoding="utf-8")


def test_every_write_has_a_fault_point() -> None:
    wrong = [problem for file, source in _sources() for problem in unguarded(source, file)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        'path.open("wb")', 'open(path, "a")', "os.replace(a, b)", "part.replace(path)", "path.rename(other)",
        "os.fsync(1)", "path.unlink()", "os.remove(path)", "shutil.rmtree(path)", "torch.save(x, path)",
        "os.open(path, os.O_RDWR | os.O_CREAT)", 'path.write_text("x")', 'path.open(mode="r+b")',
    ],
)  # fmt: skip
def test_a_write_without_a_point_is_found(line: str) -> None:
    assert unguarded(f"def f():\n    {line}\n", "data/new.py")
    assert not unguarded(f'def f():\n    faults.reach("file.open")\n    {line}\n', "data/new.py")


@pytest.mark.parametrize("line", ['path.open("rb")', 'text.replace("a", "b")', "gzip.open(p)", "items.remove(1)"])
def test_what_only_reads_needs_none(line: str) -> None:
    assert not unguarded(f"def f():\n    {line}\n", "data/new.py")


def test_the_table_is_the_code() -> None:
    used = {}
    for file, source in _sources():
        for node in ast.walk(ast.parse(source)):
            if name := _point(node):
                assert name not in used, f"{name} stands in {used[name]} and {file}: occurrences would not be countable"
                used[name] = file
    assert used == {name: point.file for name, point in faults.POINTS.items()}


@pytest.fixture
def switch() -> Iterator[None]:
    yield
    faults.arm(None)
    faults.trace(None)


@pytest.mark.usefixtures("switch")
def test_actions(tmp_path: Path) -> None:
    content = bytes(range(100))
    path = tmp_path / "file"
    faults.arm("file.write:2:flip")
    write_durably(path, content)
    assert path.read_bytes() == content
    write_durably(path, content)
    assert sum(a != b for a, b in zip(path.read_bytes(), content, strict=True)) == 1
    for action in ("ENOSPC", "EIO"):
        faults.arm(f"file.write:1:{action}")
        with pytest.raises(OSError, match=r"device|error") as caught:
            write_durably(tmp_path / "other", content)
        assert caught.value.errno == getattr(errno, action)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]
    faults.arm("file.rename/third:1:raise")
    write_durably(tmp_path / "second", content)
    with pytest.raises(faults.InjectedFault):
        write_durably(tmp_path / "third", content)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("action", ["kill", "short"])
def test_the_variable_ends_a_process_in_the_middle(tmp_path: Path, action: str) -> None:
    code = (
        "import sys, pathlib; from tencentpretrain.data.durable import write_durably\n"
        "for n in range(3): write_durably(pathlib.Path(sys.argv[1]) / f'file{n}', b'x' * 100)"
    )
    environment = {**os.environ, faults.VARIABLE: f"file.write:2:{action}"}
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    assert ended.returncode == -9
    assert (tmp_path / "file0").stat().st_size == 100
    part = tmp_path / ".file1.part"
    assert part.stat().st_size == (50 if action == "short" else 0)
    assert not (tmp_path / "file1").exists()


@pytest.mark.parametrize("switch", ["file.wrote:1:kill", "file.write:1:burn", "file.write:kill", "file.write:x:kill"])
def test_a_wrong_switch_is_refused(switch: str) -> None:
    with pytest.raises(ConfigError, match=r"TENCENTPRETRAIN_FAULT"):
        faults.arm(switch)


@pytest.mark.usefixtures("switch")
def test_a_full_disk_names_path_needed_and_free_bytes(tmp_path: Path) -> None:
    import torch

    from tencentpretrain.checkpoint.files import write_tensors

    for form in ("bin", "safetensors"):
        faults.arm("file.write:1:ENOSPC")
        with pytest.raises(ResourceError, match=r"model.*disk is full: about [\d,]+ bytes are needed, [\d,]+ are free"):
            write_tensors(tmp_path / "model", {"a": torch.zeros(1000)}, form)
        assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("switch")
def test_another_rank_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    faults.arm("file.write:1:raise:0")
    write_durably(tmp_path / "file", b"x")
    faults.arm("file.write:1:raise:1")
    with pytest.raises(faults.InjectedFault):
        write_durably(tmp_path / "file", b"x")
