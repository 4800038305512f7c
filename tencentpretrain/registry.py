"""Components found by name. A component is one file in its folder; nothing else lists it.

The names are read from the source of the folder's files, where a decorator (`@TARGETS.register("mlm")`) or an
assignment (`BERT = FAMILIES.register("bert")(...)`) registers them, so `--help` and the validation of a config know
them without importing a component (and torch with it). A file is imported when its component is first asked for.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from tencentpretrain.errors import ConfigError

T = TypeVar("T")


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the known word closest to `word`, or an empty string."""
    match = closest(word, known)
    return f"; did you mean {match!r}?" if match else ""


def closest(word: str, known: Iterable[str]) -> str | None:
    """Returns the known word that needs the fewest edits to become `word`, if one is near.

    Case, hyphens and underscores count for nothing unless they decide between equals.
    """
    plain: dict[str, list[str]] = {}
    for name in known:
        plain.setdefault(_plain(name), []).append(name)
    near = difflib.get_close_matches(_plain(word), list(plain), n=12, cutoff=0.5)
    candidates = [name for key in near if _edits(_plain(word), key) <= max(1, len(key) // 3) for name in plain[key]]
    return min(candidates, key=lambda name: (_edits(_plain(word), _plain(name)), _edits(word, name)), default=None)


def _plain(word: str) -> str:
    return word.casefold().replace("-", "_")


def _edits(first: str, second: str) -> int:
    """The optimal string alignment distance: insertions, deletions, replacements and swaps of neighbours."""
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        older, before, row = before, row, [i]
        for j, other in enumerate(second, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == other:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]


class Registry(Generic[T]):
    """The components of one kind.

    Args:
        kind: the word used in messages, such as "encoder".
        folder: the sub-package whose files hold the components.
        variable: the name this registry is bound to, as it stands in the components' decorators.
        aliases: other published spellings of a registered name.
    """

    def __init__(self, kind: str, folder: str, variable: str, aliases: dict[str, str] | None = None) -> None:
        self.kind = kind
        self.folder = folder
        self.aliases = aliases or {}
        self._variable = variable
        self._components: dict[str, T] = {}
        self._modules: dict[str, str] | None = None

    def register(self, *names: str) -> Callable[[T], T]:
        """Registers the decorated class or function under one or more names."""

        def decorate(component: T) -> T:
            for name in names:
                if name in self._components:
                    raise ValueError(f"{self.kind} {name!r} is registered twice")
                self._components[name] = component
            return component

        return decorate

    def names(self) -> tuple[str, ...]:
        """Returns all registered names, sorted, without importing any component."""
        return tuple(sorted({*self._scan(), *self._components}))

    def canonical(self, name: str) -> str:
        """Returns the registered name for a published spelling.

        Raises:
            ConfigError: there is no such component; the message has the nearest name.
        """
        name = self.aliases.get(name, name)
        known = self.names()
        if name not in known:
            hint = nearest(name, known) or f" (known: {', '.join(known)})"
            raise ConfigError(f"unknown {self.kind} {name!r}{hint}")
        return name

    def get(self, name: str) -> T:
        """Returns the component of that name, importing its file if needed.

        Raises:
            ConfigError: there is no such component.
        """
        name = self.canonical(name)
        if name not in self._components:
            importlib.import_module(self._scan()[name])
        return self._components[name]

    def _scan(self) -> dict[str, str]:
        """Maps each name to the module whose source registers it."""
        if self._modules is None:
            pattern = re.compile(rf"^(?:@|\w+ = ){self._variable}\.register\(([^)]*)\)", re.MULTILINE)
            folder = Path(__file__).parent / self.folder.replace(".", "/")
            self._modules = {
                name: f"tencentpretrain.{self.folder}.{path.stem}"
                for path in sorted(folder.glob("*.py"))
                for arguments in pattern.findall(path.read_text(encoding="utf-8"))
                for name in re.findall(r"""["']([^"']+)["']""", arguments)
            }
        return self._modules


# The element types are `Any`-valued because naming them here would import torch; `get` is called where they are known.
EMBEDDINGS: Registry[Any] = Registry("embedding", "embeddings", "EMBEDDINGS")
ENCODERS: Registry[Any] = Registry("encoder", "encoders", "ENCODERS")
DECODERS: Registry[Any] = Registry("decoder", "decoders", "DECODERS")
TARGETS: Registry[Any] = Registry("target", "targets", "TARGETS")
TOKENIZERS: Registry[Any] = Registry(
    "tokenizer", "tokenizers", "TOKENIZERS", aliases={"vqgan": "image", "multimodal": "text_image"}
)
PROCESSORS: Registry[Any] = Registry("data processor", "data.processors", "PROCESSORS")
OPTIMIZERS: Registry[Any] = Registry("optimizer", "optim", "OPTIMIZERS")
SCHEDULES: Registry[Any] = Registry("scheduler", "optim", "SCHEDULES")
TASKS: Registry[Any] = Registry("task", "tasks", "TASKS")
FAMILIES: Registry[Any] = Registry("model family", "checkpoint.families", "FAMILIES")
ROWS: Registry[Any] = Registry("row of the reliability table", "reliability", "ROWS")
