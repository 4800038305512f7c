"""Tells from a file's first bytes what it is, so that a message can name the mix-up."""

from __future__ import annotations

import json
import re
from pathlib import Path

_HEAD_BYTES = 64 * 1024
_LARGEST_JSON = 256 * 2**20

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec",
        "a git-lfs pointer (fetch the real file with `git lfs pull`)",
    ),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"%PDF-", "a PDF document"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF model file"),
    (b"\x7fELF", "an executable"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
)
_HTML = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_SENTENCEPIECE = re.compile(rb"\n.\n.[^\n]{1,64}?\x15[\s\S]{4}", re.DOTALL)


def describe_file(path: str | Path) -> str | None:
    """Returns what a file seems to be, such as "an HTML page", or None when nothing about it stands out.

    Plain UTF-8 text and JSON of no known kind give None.

    Raises:
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return "a directory"
    size = path.stat().st_size
    if size == 0:
        return "an empty file"
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for magic, description in _MAGIC:
        if head.startswith(magic):
            return description
    if head.startswith(b"PK\x03\x04"):
        return "a PyTorch checkpoint" if b"data.pkl" in head[:4096] else "a zip archive"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle file"
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "a safetensors file"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if _HTML.match(head):
        return "an HTML page (a download that needed a log-in, or a wrong address)"
    if _SENTENCEPIECE.match(head):
        return "a SentencePiece model"
    if b"\x00" in head:
        return "a binary file"
    return _describe_text(head, cut=size > len(head)) or _describe_json(path, head, size)


def _describe_text(head: bytes, *, cut: bool) -> str | None:
    try:
        head.decode("utf-8")
        return None
    except UnicodeDecodeError as error:
        if cut and error.start >= len(head) - 3:  # the last character was cut by reading only the beginning
            return None
    for encoding, name in (("gb18030", "GB18030/GBK"), ("big5", "Big5")):
        try:
            head[: len(head) - 4 if cut else None].decode(encoding)
            return f"text that is not UTF-8 (it reads as {name})"
        except UnicodeDecodeError:
            continue
    return "a binary file, or text that is not UTF-8"


def _describe_json(path: Path, head: bytes, size: int) -> str | None:
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{" or size > _LARGEST_JSON:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    keys = set(content)
    if "model" in keys and keys & {"added_tokens", "pre_tokenizer", "normalizer"}:
        return "a Hugging Face tokenizer.json"
    if "weight_map" in keys:
        return "the index of a sharded checkpoint"
    if "tokenizer_class" in keys or {"model_max_length", "clean_up_tokenization_spaces"} <= keys:
        return "a Hugging Face tokenizer_config.json"
    if keys & {"zero_optimization", "train_micro_batch_size_per_gpu"}:
        return "a DeepSpeed config"
    if keys & {"architectures", "transformers_version", "model_type"}:
        return "a Hugging Face config"
    if len(keys) > 100 and all(isinstance(value, int) for value in content.values()):
        return "a JSON vocabulary (token to id)"
    return None
