"""S2: safetensors files whose headers lie."""

from __future__ import annotations

import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tencentpretrain.checkpoint.files import read_tensors
from tencentpretrain.errors import CheckpointMismatch
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs
from tencentpretrain.reliability.row import Row, Scale

_BYTES = 4096
_BOUND = 64 * 2**20
_NUMBERS = (-1, 0, 1, 7, 2**31, 2**32 + 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)

Header = dict[str, Any]


@ROWS.register("S2")
def check_headers(scale: Scale, folder: Path) -> Row:
    """Headers that lie about lengths, offsets, shapes and formats, and bytes that are no header."""
    count = 1000 if scale == "full" else 250
    found = runs.in_child(lambda: _fuzz(folder, count))
    return Row(
        name="S2",
        promised="1,000 fuzzed safetensors headers: refused, memory bounded, 0 crashes",
        reached=(
            f"{count} files: {found['refused']} refused by name, {found['sound']} sound after all and read, "
            f"{len(found['crashes'])} crashes; memory grew by at most {found['grown'] / 2**20:.0f} MiB"
            + "".join(f"; {text}" for text in found["crashes"][:3])
        ),
        passed=not found["crashes"] and found["refused"] + found["sound"] == count and found["grown"] <= _BOUND
        and found["refused"] > count // 2,
    )  # fmt: skip


def _fuzz(folder: Path, count: int) -> dict[str, Any]:
    draw = random.Random(2)
    path = folder / "fuzzed.safetensors"
    refused = sound = 0
    crashes: list[str] = []
    path.write_bytes(_file(_good(), bytes(_BYTES)))
    read_all(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        content = _lie(draw)
        path.write_bytes(content)
        try:
            read_all(path)
            sound += 1
        except CheckpointMismatch as error:
            if str(path) in str(error):
                refused += 1
            else:
                crashes.append(f"file {number} is not named: {error}")
        except Exception as error:
            crashes.append(f"file {number}: {type(error).__name__}: {error}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"refused": refused, "sound": sound, "crashes": crashes, "grown": grown}


def read_all(path: Path) -> None:
    """Reads every tensor of a file."""
    opened = read_tensors(path)
    for name in opened:
        tensor = opened[name]
        if tuple(tensor.shape) != opened.shape(name):
            raise ValueError(f"{name} has another shape than the header says")


def _good() -> Header:
    return {
        "a": {"dtype": "F32", "shape": [8, 16], "data_offsets": [0, 512]},
        "b": {"dtype": "F16", "shape": [256], "data_offsets": [512, 1024]},
        "c": {"dtype": "I64", "shape": [384], "data_offsets": [1024, _BYTES]},
    }


def _file(header: object, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text + data


def _lie(draw: random.Random) -> bytes:
    header, data = _good(), bytes(_BYTES)
    name = draw.choice(list(header))
    entry: Any = header[name]
    length = None

    def offset() -> None:
        entry["data_offsets"][draw.randrange(2)] = draw.choice((*_NUMBERS, draw.randrange(_BYTES * 2)))

    def shape() -> None:
        entry["shape"][0] = draw.choice((*_NUMBERS, draw.randrange(1000)))

    def more_shape() -> None:
        entry["shape"] = [draw.choice(_NUMBERS) for _ in range(draw.randrange(12))]

    def dtype() -> None:
        entry["dtype"] = draw.choice(("F64", "F8_E4M3", "U64", "C64", "f32", "", 5, None, "BOOL", "X" * 1000))

    def overlap() -> None:
        header["b"]["data_offsets"] = [0, 512]

    def swapped() -> None:
        entry["data_offsets"].reverse()

    def wrong_type() -> None:
        entry[draw.choice(list(entry))] = draw.choice(([], {}, "text", None, True, 1.5, [[1]], ["1", "2"], [1, 2, 3]))

    def lost() -> None:
        del entry[draw.choice(list(entry))]

    def metadata() -> None:
        header["__metadata__"] = draw.choice(
            ({"a": 1}, [], "x", {"tied": "{"}, {"tied": '{"a": "z"}'}, {"tied": "[1]"})
        )

    def names() -> None:
        header[draw.choice(("", "a" * 100_000, "\0", "../../x", "module.a"))] = dict(entry)

    def extra() -> None:
        for number in range(2000):
            header[f"t{number}"] = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}

    lies: list[Callable[[], None]] = [
        offset, offset, shape, more_shape, dtype, overlap, swapped, wrong_type, wrong_type, lost, metadata, names,
        extra,
    ]  # fmt: skip
    kind = draw.randrange(10)
    if kind == 0:
        length = draw.choice(_NUMBERS)
    elif kind == 1:
        data = data[: draw.randrange(_BYTES)] + bytes(draw.choice((0, 0, 5000)))
    elif kind == 2:
        content = bytearray(_file(header, data))
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(min(len(content), 260))] ^= 1 << draw.randrange(8)
        return bytes(content)
    elif kind == 3:
        deep = (b"[" * 100_000, b'{"a":' * 50_000)
        text = draw.choice((*deep, b"", b"null", b"\xff" * 64, b'{"a": 1e999}', b"{" + b" " * 9000))
        return _file(text, data)
    else:
        for lie in draw.sample(lies, draw.choice((1, 1, 1, 2, 3))):
            try:
                lie()
            except (KeyError, TypeError, IndexError, AttributeError):
                continue  # an earlier lie took away what this one is about
    return _file(header, data, length)
