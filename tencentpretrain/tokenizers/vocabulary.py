"""Reads vocabularies, and says what is wrong with files that are none."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tencentpretrain.errors import ConfigError, DataFormatError
from tencentpretrain.sniff import describe_file


def read_text_file(path: str, *, flag: str, wanted: str) -> str:
    """Reads a UTF-8 file that a flag names; a byte-order mark is dropped.

    Raises:
        ConfigError: there is no such file.
        DataFormatError: the file is empty or recognisably something else.
    """
    check_file(path, flag=flag, wanted=wanted)
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataFormatError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} is not UTF-8; --{flag} wants {wanted} in UTF-8"
        ) from None


def check_file(path: str, *, flag: str, wanted: str, binary: bool = False) -> None:
    """Refuses a path that does not exist or whose first bytes show another kind of file.

    Raises:
        ConfigError: there is no such file.
        DataFormatError: the file is something else than text (or, with `binary`, than a SentencePiece model).
    """
    if not Path(path).exists():
        raise ConfigError(f"{flag}: {path} does not exist")
    what = describe_file(path)
    if binary:
        if what != "a SentencePiece model":
            raise DataFormatError(f"{path}: --{flag} wants {wanted}, but this is {what or 'a text file'}")
    elif what is not None:
        hint = ""
        if what.startswith("a SentencePiece"):
            hint = "; pass it as --spm_model_path"
        elif what.startswith("a Hugging Face tokenizer"):
            hint = "; pass its folder as --vocab_path with --tokenizer hfpretrained"
        elif what.startswith("a JSON vocabulary"):
            hint = "; write the tokens in the order of their ids, one per line"
        raise DataFormatError(f"{path}: --{flag} wants {wanted}, but this is {what}{hint}")


def read_vocabulary(path: str) -> tuple[str, ...]:
    """Reads a vocabulary: one token per line, the first field of the line; its id is the line number from 0.

    A line of nothing but white space is a token as it stands (a published Chinese vocabulary has U+2028 as a token); an
    empty line is the empty token.

    Raises:
        ConfigError: there is no such file.
        DataFormatError: the file is no vocabulary, or a token stands on two lines.
    """
    text = read_text_file(path, flag="vocab_path", wanted="a vocabulary, one token per line")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if lines[-1] == "":  # the end of the last line, not a line
        lines.pop()
    if text.lstrip()[:1] == "{" and text.rstrip()[-1:] == "}":
        raise DataFormatError(f"{path}: --vocab_path wants a vocabulary, one token per line, but this is a JSON file")
    tokens = tuple((line.split(maxsplit=1) or [line])[0] for line in lines)
    refuse_duplicates(tokens, path)
    return tokens


def refuse_duplicates(tokens: Sequence[str], source: str) -> None:
    """Refuses a vocabulary in which one token has two ids, because ids and vocabulary size would not fit together.

    Raises:
        DataFormatError: with the first few duplicates and their lines.
    """
    first: dict[str, int] = {}
    duplicates: list[str] = []
    for line, token in enumerate(tokens, start=1):
        if token in first:
            duplicates.append(f"{token!r} on lines {first[token]} and {line}")
        else:
            first[token] = line
    if duplicates:
        more = f" and {len(duplicates) - 3} more" if len(duplicates) > 3 else ""
        raise DataFormatError(f"{source}: a token may stand only once, but {'; '.join(duplicates[:3])}{more}")


def digest(*parts: str | bytes) -> str:
    """Returns the SHA-256 of the parts, each framed by its length so that no two lists of parts collide."""
    state = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(content).to_bytes(8, "little"))
        state.update(content)
    return state.hexdigest()
