"""BERT's basic tokenizer: cleaning, CJK apart, lower case without accents, punctuation apart.

Character classes follow Google BERT's published `BasicTokenizer` (Devlin et al., 2019, arXiv:1810.04805). Lower-casing
works on whole words, because a Greek capital sigma depends on its neighbours.
"""

from __future__ import annotations

import re
import unicodedata

from tencentpretrain.tokenizers.base import is_cjk

_ASCII_CONTROLS = {point: None for point in (*range(0x20), 0x7F) if chr(point) not in "\t\n\r"}
_ASCII_WORD = re.compile(r"[0-9A-Za-z]+|[!-/:-@\[-`{-~]")


def is_dropped(char: str) -> bool:
    """Says whether cleaning removes a character: NUL, the replacement character, controls and format characters."""
    if char in "\t\n\r":
        return False
    return char in "\x00\ufffd" or unicodedata.category(char) in ("Cc", "Cf")


def is_space(char: str) -> bool:
    """Says whether a character that cleaning keeps separates words."""
    return char.isspace() or unicodedata.category(char) == "Zs"


def is_punctuation(char: str) -> bool:
    """Says whether a character is set apart as punctuation: all ASCII symbols and Unicode's categories P*."""
    point = ord(char)
    if 33 <= point <= 47 or 58 <= point <= 64 or 91 <= point <= 96 or 123 <= point <= 126:
        return True
    return unicodedata.category(char).startswith("P")


def basic_words(text: str, *, lower: bool) -> list[str]:
    """Cuts a text into words, CJK characters and punctuation characters, in order."""
    if text.isascii():
        kept = text.translate(_ASCII_CONTROLS)
        return _ASCII_WORD.findall(kept.lower() if lower else kept)
    cleaned: list[str] = []
    for char in text:
        if is_dropped(char):
            continue
        if is_space(char):
            cleaned.append(" ")
        elif is_cjk(char):
            cleaned += (" ", char, " ")
        else:
            cleaned.append(char)
    words: list[str] = []
    for word in "".join(cleaned).split():
        if lower:
            decomposed = unicodedata.normalize("NFD", word.lower())
            word = "".join(char for char in decomposed if unicodedata.category(char) != "Mn")
        words += _split_punctuation(word)
    return words


def _split_punctuation(word: str) -> list[str]:
    parts: list[str] = []
    run = ""
    for char in word:
        if is_punctuation(char):
            if run:
                parts.append(run)
                run = ""
            parts.append(char)
        else:
            run += char
    if run:
        parts.append(run)
    return parts
