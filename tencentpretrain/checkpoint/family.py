"""A model family: one table that maps tensors between a Hugging Face model and ours, read in both directions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tencentpretrain.checkpoint.rules import Rename, Rule
from tencentpretrain.config.loading import config_from_values
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.errors import CheckpointMismatch, ConfigError
from tencentpretrain.registry import FAMILIES

Settings = Mapping[str, Any]
"""The object in a config.json: theirs, or a model JSON of ours."""

LAYER = "i"
WORDS: Mapping[str, Mapping[str, str]] = {
    "p": {"weight": "weight", "bias": "bias"},
    "n": {"gamma": "weight", "beta": "bias"},
}
"""Placeholders that every table may use: our word -> their word. `{i}` stands for the number of a layer."""


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for, so that a conversion holds one of them at a time."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(frozen=True)
class Choice:
    """Renames that hold only where `field` of our config has this value."""

    field: str
    value: Any
    renames: Mapping[str, str]


@dataclass(frozen=True)
class _Instance:
    """One rule with its placeholders filled in."""

    rule: Rule
    ours: tuple[str, ...]
    theirs: str
    needed: bool


@dataclass(frozen=True, kw_only=True)
class Family:
    """How models of one architecture are called on both sides.

    Fields:
        name: the `model_type` of their config.
        model_class: the class of theirs whose file this is, for messages.
        config: maps their config and the names in their file to a model JSON of ours.
        renames: template of ours -> template of theirs.
        rules: tensors that change their shape on the way.
        choices: renames that depend on the config.
        words: placeholders of this table: our word -> their word.
        prefix: what their names start with; files saved from the bare body lack it.
        aliases: patterns of older spellings of theirs and what they are now.
        theirs_only: templates of names that carry nothing: buffers and tensors that no model reads.
        shared: groups of their names that are one tensor; a file need hold only one of each group.
        tied: their head -> their table, one tensor where the config has tie_weights.
        optional: starts of our names that a file may lack, such as heads.
    """

    name: str
    model_class: str
    config: Callable[[Settings, Collection[str]], dict[str, Any]]
    renames: Mapping[str, str]
    rules: Sequence[Rule] = ()
    choices: Sequence[Choice] = ()
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    prefix: str = ""
    aliases: Sequence[tuple[str, str]] = ()
    theirs_only: Sequence[str] = ()
    shared: Sequence[tuple[str, ...]] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    optional: Sequence[str] = ()

    def to_ours(
        self, hf_config: Settings, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """Returns the model JSON (published spellings) and the tensors of a model of theirs, under our names.

        A head that the file holds beside the table it is tied to, and that differs from it, stays its own tensor:
        the JSON then has no `tie_weights`.

        Raises:
            ConfigError: their config is of another family, or asks for something that our JSON cannot say.
            CheckpointMismatch: a tensor has no place in the table, or is missing; all of them are listed.
        """
        model_type = hf_config.get("model_type")
        if model_type is not None and FAMILIES.get(model_type) is not self:
            raise ConfigError(f"the Hugging Face config describes a {model_type} model, but is read as {self.name}")
        sources = self._canonical(tensors)
        settings = self.config(hf_config, frozenset(sources))
        read: dict[str, Callable[[], Tensor]] = {
            name: partial(tensors.__getitem__, source) for name, source in sources.items()
        }
        for group in self.shared:
            _require_equal(self, group, read)
            _fill(group, read)
        for head, table in self.tied.items():
            if settings["tie_weights"] and head in read and table in read and not _equal(read[head], read[table]):
                settings["tie_weights"] = False
        config = config_from_values(settings, source=f"model JSON of a {self.name} model")
        self._fill_tied(read, config)

        instances = self._instances(config)
        known = {instance.theirs for instance in instances}
        self._account(
            side="the Hugging Face file",
            leftover=[name for name in sources if name not in known and not self._carries_nothing(name)],
            missing=[each.theirs for each in self._expected(instances, lambda each: each.theirs in read)],
        )
        ours: dict[str, Callable[[], Tensor]] = {}
        for each in instances:
            if each.theirs in read:
                for part, name in enumerate(each.ours):
                    ours[name] = partial(self._read_part, each, read[each.theirs], part, config)
        return settings, LazyTensors(ours)

    def to_theirs(self, config: ModelConfig | Settings, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the tensors of a model of ours under their names, every tied or shared one under all of its names.

        Args:
            config: of our model, read or as its JSON object.
            tensors: by our current names (`checkpoint.mapping` migrates older ones).

        Raises:
            CheckpointMismatch: a tensor has no place in the table, or is missing; all of them are listed.
        """
        if not isinstance(config, ModelConfig):
            config = config_from_values(config, source="our model JSON")
        instances = self._instances(config)
        theirs: dict[str, Callable[[], Tensor]] = {}
        for each in instances:
            if all(name in tensors for name in each.ours):
                theirs[each.theirs] = partial(_write_whole, each, tensors, config)
        self._fill_tied(theirs, config)
        for group in self.shared:
            _require_equal(self, group, theirs)
            _fill(group, theirs)
        known = {name for each in instances for name in each.ours}
        self._account(
            side="our file",
            leftover=[name for name in tensors if name not in known],
            missing=[
                name
                for each in self._expected(instances, lambda each: each.theirs in theirs)
                for name in each.ours
                if name not in tensors
            ],
        )
        return LazyTensors(theirs)

    def _canonical(self, names: Iterable[str]) -> dict[str, str]:
        """Maps the current spelling of each of their names to the name in the file."""
        result: dict[str, str] = {}
        names = list(names)
        bare = bool(self.prefix) and not any(name.startswith(self.prefix) for name in names)
        outside = [template for template in self._their_templates() if not template.startswith(self.prefix)]
        for source in names:
            name = source
            for old, new in self.aliases:
                name = re.sub(old, new, name)
            if bare and not any(_pattern(template).fullmatch(name) for template in outside):
                name = self.prefix + name
            if name in result:
                raise CheckpointMismatch(f"the file holds one tensor under two spellings: {result[name]} and {source}")
            result[name] = source
        return result

    def _their_templates(self) -> Iterator[str]:
        yield from self.renames.values()
        yield from (rule.theirs for rule in self.rules)
        yield from (theirs for choice in self.choices for theirs in choice.renames.values())
        yield from itertools.chain(self.theirs_only, *self.shared)

    def _instances(self, config: ModelConfig) -> list[_Instance]:
        """Fills the placeholders of every rule that holds for this config."""
        rules = [
            *(Rename((ours,), theirs) for ours, theirs in self.renames.items()),
            *(
                Rename((ours,), theirs)
                for choice in self.choices
                if getattr(config, choice.field) == choice.value
                for ours, theirs in choice.renames.items()
            ),
            *self.rules,
        ]
        words = {**WORDS, **self.words}
        result = []
        for rule in rules:
            places = sorted(set(re.findall(r"{(\w+)}", "".join(rule.ours) + rule.theirs)) - {LAYER})
            for chosen in itertools.product(*(words[place].items() for place in places)):
                ours_words = {place: word for place, (word, _) in zip(places, chosen, strict=True)}
                theirs_words = {place: word for place, (_, word) in zip(places, chosen, strict=True)}
                layered = any(f"{{{LAYER}}}" in template for template in rule.ours)
                first = rule.ours[0].format(i=0, **ours_words)
                depth = config.num_decoder_layers if first.startswith("decoder.") else config.num_layers
                needed = ours_words.get("p") != "bias" and not first.startswith(tuple(self.optional))
                for layer in range((depth or 0) if layered else 1):
                    result.append(
                        _Instance(
                            rule,
                            tuple(template.format(i=layer, **ours_words) for template in rule.ours),
                            rule.theirs.format(i=layer, **theirs_words),
                            needed,
                        )
                    )
        return result

    def _expected(self, instances: Sequence[_Instance], present: Callable[[_Instance], bool]) -> Iterator[_Instance]:
        """Yields what is missing: what a model must have, and what only some of its layers have (a bias, say)."""
        per_layer: dict[str, list[_Instance]] = {}
        for each in instances:
            per_layer.setdefault(re.sub(r"\.\d+\.", ".*.", each.ours[0], count=1), []).append(each)
        for layers in per_layer.values():
            if layers[0].needed or any(map(present, layers)):
                yield from (each for each in layers if not present(each))

    def _read_part(self, each: _Instance, read: Callable[[], Tensor], part: int, config: ModelConfig) -> Tensor:
        tensor = read()
        try:
            return each.rule.read(tensor, config)[part]
        except RuntimeError as error:  # what torch raises where a shape cannot be cut
            raise CheckpointMismatch(
                f"{each.theirs} has shape {list(tensor.shape)}, which does not go with the sizes in the config of this "
                f"{self.name} model; the config may belong to another file"
            ) from error

    def _fill_tied(self, readers: dict[str, Callable[[], Tensor]], config: ModelConfig) -> None:
        """Lets a tied head that is not there read the table, if the model has that head at all."""
        for head, table in self.tied.items():
            (target,) = {ours.split(".")[1] for ours, theirs in self.renames.items() if theirs == head}
            if config.tie_weights and target in config.target and table in readers:
                readers.setdefault(head, readers[table])

    def _carries_nothing(self, name: str) -> bool:
        """Whether a name of theirs is a buffer, or one that stands for a tensor which is read under another name."""
        return any(_pattern(template).fullmatch(name) for template in self.theirs_only) or any(
            name in group for group in self.shared
        )

    def _account(self, *, side: str, leftover: Sequence[str], missing: Sequence[str]) -> None:
        if not leftover and not missing:
            return
        lines = [f"{side} does not hold a {self.name} model ({self.model_class}) as its config describes it"]
        for title, names in (("without a place in the table", leftover), ("missing", missing)):
            if names:
                lines.append(f"  {title} ({len(names)}): {', '.join(names)}")
        raise CheckpointMismatch("\n".join(lines))


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """Returns what a template of a name matches, whatever its words."""
    return re.compile(r"[\w.]+".join(re.escape(text) for text in re.split(r"{\w+}", template)))


def _write_whole(each: _Instance, tensors: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    return each.rule.write([tensors[name] for name in each.ours], config)


def _fill(group: Sequence[str], readers: dict[str, Callable[[], Tensor]]) -> None:
    """Lets every name of a group read the tensor of one that is there."""
    found = next((readers[name] for name in group if name in readers), None)
    if found is not None:
        for name in group:
            readers.setdefault(name, found)


def _require_equal(family: Family, group: Sequence[str], readers: Mapping[str, Callable[[], Tensor]]) -> None:
    """Refuses a file whose copies of one tensor differ: only one of them could be kept."""
    present = [name for name in group if name in readers]
    for name in present[1:]:
        if not _equal(readers[present[0]], readers[name]):
            raise CheckpointMismatch(
                f"{present[0]} and {name} are one tensor in a Hugging Face {family.name} model, but differ here; "
                "keep the one that was trained in place of both"
            )


def _equal(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> bool:
    """Whether two tensors are the same; on the meta device, where there are no values, whether they have one shape."""
    left, right = first(), second()
    if left.is_meta or right.is_meta:
        return left.shape == right.shape
    return torch.equal(left, right)
