"""Files that run code when a careless reader opens them: they make a folder, which shows that they ran."""

from __future__ import annotations

import builtins
import functools
import gzip
import io
import os
import pickle
import pickletools
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _Reduce:
    """Pickles to the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _call(mark: str) -> _Reduce:
    return _Reduce(os.mkdir, mark)


def _text(mark: str) -> bytes:
    return f"__import__('os').mkdir({mark!r})".encode()


def _torch(value: Any, *, archive: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


def _zip(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def _numpy(mark: str, save: Callable[..., None]) -> bytes:
    file = io.BytesIO()
    save(file, np.array([_call(mark)], dtype=object), allow_pickle=True)
    return file.getvalue()


def _tar(mark: str) -> bytes:
    """The form of torch before 0.1.10: a tar archive of pickles."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(_call(mark), 2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _state(mark: str) -> dict[str, Any]:
    return {"model": OrderedDict(bias=_call(mark), weight=torch.ones(2, 2)), "step": 3}


def _instance(mark: str, kind: bytes) -> bytes:
    """Hand-made code with the old instructions INST, OBJ, or STACK_GLOBAL with REDUCE."""
    quoted = mark.encode()
    if kind == b"i":
        return b"(V" + quoted + b"\nios\nmkdir\n."
    if kind == b"o":
        return b"(cos\nmkdir\nV" + quoted + b"\no."
    return b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93X" + len(quoted).to_bytes(4, "little") + quoted + b"\x85R."


def _built(mark: str) -> bytes:
    """BUILD calls `__setstate__` of an object whose class was made on the way: functools.partial."""
    return pickle.dumps(_Reduce(functools.partial(os.mkdir, mark)), 2)


def _storage(mark: str) -> bytes:
    """A tensor whose storage's key is the call: the persistent id of a torch archive."""
    body = pickle.dumps(("storage", torch.FloatStorage, _call(mark), "cpu", 1), 2)
    content = body[:-1] + b"Q."
    return _zip([("archive/data.pkl", content), ("archive/version", b"3\n"), ("archive/data/0", b"\0" * 4)])


FAMILIES: Mapping[str, Callable[[str], bytes]] = {
    "reduce, protocol 0": lambda mark: pickle.dumps(_call(mark), 0),
    "reduce, protocol 2": lambda mark: pickle.dumps(_call(mark), 2),
    "reduce, protocol 5": lambda mark: pickle.dumps(_call(mark), 5),
    "eval of text": lambda mark: pickle.dumps(_Reduce(builtins.eval, _text(mark).decode()), 2),
    "exec of text, minimised": lambda mark: pickletools.optimize(
        pickle.dumps(_Reduce(builtins.exec, _text(mark).decode()), 4)
    ),
    "getattr chain": lambda mark: pickle.dumps(_Reduce(getattr(os, "mkdir"), mark), 3),  # noqa: B009 (as attacks do)
    "partial": _built,
    "INST": lambda mark: _instance(mark, b"i"),
    "OBJ": lambda mark: _instance(mark, b"o"),
    "STACK_GLOBAL": lambda mark: _instance(mark, b"r"),
    "list of instances": lambda mark: pickle.dumps([[1, 2, 3], _call(mark)], 2) + pickle.dumps(_call(mark), 2),
    "torch archive": lambda mark: _torch(_call(mark), archive=True),
    "torch archive, nested in a state": lambda mark: _torch(_state(mark), archive=True),
    "torch legacy file": lambda mark: _torch(_state(mark), archive=False),
    "torch legacy tar": _tar,
    "storage key": _storage,
    "two data.pkl in one archive": lambda mark: _zip(
        [("a/data.pkl", pickle.dumps({}, 2)), ("a/version", b"3\n"), ("b/data.pkl", pickle.dumps(_call(mark), 2))]
    ),
    "compressed data.pkl": lambda mark: _zip(
        [("a/data.pkl", pickle.dumps(_call(mark), 2)), ("a/version", b"3\n")], zipfile.ZIP_DEFLATED
    ),
    "numpy object array": lambda mark: _numpy(mark, np.save),
    "gzip of a pickle": lambda mark: gzip.compress(pickle.dumps(_call(mark), 2)),
}
"""By family, the content of a file that makes the folder `mark`."""


def careless(path: Path) -> None:
    """Opens a file as a careless reader would: it must run, or the payload shows nothing."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            contents = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    elif content[:6] == b"\x93NUMPY":
        np.load(path, allow_pickle=True)
        return
    elif content[257:262] == b"ustar":
        with tarfile.open(path) as tar:
            contents = [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
    else:
        contents = [content]
    for item in contents:
        stream = io.BytesIO(item)
        while stream.tell() < len(item):
            reader = pickle.Unpickler(stream)
            reader.persistent_load = lambda key: key  # type: ignore[method-assign]
            reader.load()
