"""Weights into a model: everything fits and is copied, or nothing is and the list says why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tencentpretrain.checkpoint.files import TensorFile, read_tensors
from tencentpretrain.checkpoint.layout import Layout
from tencentpretrain.checkpoint.mapping import Migration, migrate
from tencentpretrain.errors import CheckpointMismatch
from tencentpretrain.registry import nearest

_LISTED = 12
_HUGGING_FACE = ("bert.", "roberta.", "albert.", "transformer.h.", "model.layers.", "model.encoder.", "encoder.block.")
_VOCABULARY_ROWS = (
    "word.embedding.weight",
    "language_embedding.embedding.weight",
    "target.mlm.linear_2.weight",
    "target.mlm.linear_2.bias",
    "target.lm.output_layer.weight",
    "target.lm.output_layer.bias",
    "target.bilm.output_layer.weight",
)


@dataclass(frozen=True, kw_only=True)
class Misshapen:
    """A tensor whose shapes in file and model differ."""

    name: str
    file_shape: tuple[int, ...]
    model_shape: tuple[int, ...]

    @property
    def counts_tokens(self) -> bool:
        """Whether only the number of vocabulary rows differs."""
        return self.name.endswith(_VOCABULARY_ROWS) and self.file_shape[1:] == self.model_shape[1:]

    def __str__(self) -> str:
        return f"{self.name}: {list(self.file_shape)} in the file, {list(self.model_shape)} in the model"


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a load did, by current tensor names.

    Fields:
        source: the file or directory.
        loaded: copied into the model.
        missing: in the model, not in the file; they keep their initial values.
        unexpected: in the file, not in the model; names as in the file.
        misshapen: in both with different shapes; not copied.
        migrated: name in the file -> name now, or the reason why it was not read.
        untied: heads that got a tensor of their own because the file holds different values for head and embedding.
        resized: vocabulary tensors of which the common rows were copied.
    """

    source: str
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[Misshapen, ...] = ()
    migrated: Mapping[str, str] = field(default_factory=dict)
    untied: tuple[str, ...] = ()
    resized: tuple[Misshapen, ...] = ()

    def text(self) -> str:
        """Returns the report for people: one line, then a line per kind of difference."""
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        if self.missing:
            lines.append(f"  {len(self.missing)} not in the file, kept as initialised: {_few(self.missing)}")
        if self.unexpected:
            lines.append(f"  {len(self.unexpected)} in the file only, not used: {_few(self.unexpected)}")
        lines += [f"  not loaded, other shape: {entry}" for entry in self.misshapen]
        lines += [f"  common rows copied, the rest as initialised: {entry}" for entry in self.resized]
        if self.migrated:
            shown = (f"{old} -> {new}" for old, new in self.migrated.items())
            lines.append(f"  {len(self.migrated)} older names: {_few(tuple(shown))}")
        if self.untied:
            lines.append(f"  {_few(self.untied)}: differs from the embedding in the file, so it is kept untied")
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    strict: bool = True,
    allow_missing: Sequence[str] = (),
    ignore_unexpected: Sequence[str] = (),
    resize_vocab: bool = False,
    layout: Layout | None = None,
) -> LoadReport:
    """Copies the weights of a file or directory into a model.

    Nothing is copied unless everything fits. Values are read tensor by tensor, so there is never a second whole model
    in memory; floating-point formats are converted.

    Args:
        strict: whether missing, unexpected and misshapen tensors are refused.
        allow_missing: prefixes of tensors that may be absent from the file ("output_layer_").
        ignore_unexpected: prefixes of tensors of the file that the model need not have ("target.").
        resize_vocab: copy the common rows where file and model have vocabularies of different size.
        layout: which part of each tensor this process holds; all of it if None.

    Raises:
        CheckpointMismatch: the file is not usable or does not fit; the message lists the tensors.
    """
    return load_tensors(
        model,
        read_tensors(path),
        source=str(path),
        strict=strict,
        allow_missing=allow_missing,
        ignore_unexpected=ignore_unexpected,
        resize_vocab=resize_vocab,
        layout=layout,
    )


def load_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str = "tensors",
    strict: bool = True,
    allow_missing: Sequence[str] = (),
    ignore_unexpected: Sequence[str] = (),
    resize_vocab: bool = False,
    layout: Layout | None = None,
) -> LoadReport:
    """Does what `load_checkpoint` does with tensors that are at hand."""
    layout = layout or Layout()
    own = layout.tensors(model)
    migration = migrate(list(tensors), own)
    present = [name for name in own if name in migration.sources]
    misshapen: list[Misshapen] = []
    resized: list[Misshapen] = []
    for name in present:
        file_shape, model_shape = _shape(tensors, migration.sources[name]), layout.shape(name, own[name])
        if file_shape != model_shape:
            entry = Misshapen(name=name, file_shape=file_shape, model_shape=model_shape)
            (resized if resize_vocab and entry.counts_tokens else misshapen).append(entry)
    unusable = {entry.name for entry in misshapen}
    fitting = [name for name in present if name not in unusable]
    groups = _tied_groups(own)
    untied = _heads_to_untie(groups, fitting, tensors, migration, source)
    shared = {twin for name in present if name not in untied for twin in groups[name]}
    served = set(present) | (shared - set(untied))
    missing = tuple(name for name in own if name not in served)
    unexpected = tuple(old for new, old in migration.sources.items() if new not in own)

    _refuse_other_numbers(own, fitting, tensors, migration, source)
    _refuse_foreign(present, tensors, own, source, strict=strict)
    if strict:
        absent = [name for name in missing if not name.startswith(tuple(allow_missing))]
        foreign = [name for name in unexpected if not name.startswith(tuple(ignore_unexpected))]
        problems = (
            _missing_problems(absent, foreign) + _unexpected_problems(foreign, absent) + _shape_problems(misshapen)
        )
        if problems:
            raise CheckpointMismatch("\n".join([f"{source} does not fit the model; nothing was loaded", *problems]))

    if untied:
        untie = getattr(model, "untie_head", None)
        if untie is None:
            raise CheckpointMismatch(f"{source}: {_few(untied)} differs from the embedding, but this model ties them")
        untie()
        own = layout.tensors(model)
    for name in fitting:
        values = tensors[migration.sources[name]]
        rows = layout.shape(name, own[name])[:1]
        layout.write(name, own[name], values[: rows[0]] if rows else values)
    return LoadReport(
        source=source,
        loaded=tuple(fitting),
        missing=missing,
        unexpected=unexpected,
        misshapen=tuple(misshapen),
        migrated={**migration.renamed, **{old: f"({reason})" for old, reason in migration.dropped.items()}},
        untied=tuple(untied),
        resized=tuple(resized),
    )


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return tensors.shape(name) if isinstance(tensors, TensorFile) else tuple(tensors[name].shape)


def _dtype(tensors: Mapping[str, Tensor], name: str) -> torch.dtype:
    return tensors.dtype(name) if isinstance(tensors, TensorFile) else tensors[name].dtype


def _tied_groups(own: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Maps each name to all names of the same tensor, itself included."""
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in own.items():
        by_tensor.setdefault(id(tensor), []).append(name)
    return {name: tuple(by_tensor[id(tensor)]) for name, tensor in own.items()}


def _heads_to_untie(
    groups: Mapping[str, tuple[str, ...]],
    fitting: Sequence[str],
    tensors: Mapping[str, Tensor],
    migration: Migration,
    source: str,
) -> list[str]:
    """Finds heads whose values in the file differ from the embedding's that the model ties them to."""
    untied: list[str] = []
    present = set(fitting)
    for members in dict.fromkeys(groups[name] for name in fitting if len(groups[name]) > 1):
        here = [name for name in members if name in present]
        bodies = [name for name in here if not name.startswith("target.")]
        for name in here:
            if not bodies or name == bodies[0]:
                continue
            if torch.equal(tensors[migration.sources[name]], tensors[migration.sources[bodies[0]]]):
                continue
            if not name.startswith("target."):
                raise CheckpointMismatch(
                    f"{source}: {bodies[0]} and {name} differ, but the model's settings make them one tensor "
                    "(tie_weights, share_embedding or parameter_sharing); switch that off in the model's JSON"
                )
            untied.append(name)
    return untied


def _refuse_other_numbers(
    own: Mapping[str, Tensor], names: Iterable[str], tensors: Mapping[str, Tensor], migration: Migration, source: str
) -> None:
    for name in names:
        dtype = _dtype(tensors, migration.sources[name])
        if dtype.is_floating_point != own[name].dtype.is_floating_point:
            raise CheckpointMismatch(f"{source}: {name} holds {dtype} numbers where the model has {own[name].dtype}")


def _refuse_foreign(
    present: Sequence[str], tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str, *, strict: bool
) -> None:
    """Refuses a file that has nothing to do with the model."""
    body = ("embedding.", "encoder.")
    if any(name.startswith(body) for name in present) or (present and not strict):
        return
    if present and not any(name.startswith(body) for name in own):
        return
    theirs, ours = list(tensors), list(own)
    what = "no tensor of embedding or encoder" if present else "no tensor"
    hint = ""
    if any(name.startswith(_HUGGING_FACE) for name in theirs):
        hint = " These are Hugging Face names: convert the file first."
    raise CheckpointMismatch(
        f"{source}: {what} has a name of the model, so this is another model or another configuration; "
        f"nothing was loaded. The file has {len(theirs)} tensors ({_few(theirs, 3)}), "
        f"the model {len(ours)} ({_few(ours, 3)}).{hint}"
    )


def _missing_problems(missing: Sequence[str], unexpected: Sequence[str]) -> list[str]:
    if not missing:
        return []
    lines = [f"  {name}{nearest(name, unexpected)}" for name in missing[:_LISTED]]
    return [f"missing from the file ({len(missing)}; --allow_missing PREFIX accepts it):", *lines, *_rest(missing)]


def _unexpected_problems(unexpected: Sequence[str], missing: Sequence[str]) -> list[str]:
    if not unexpected:
        return []
    lines = [f"  {name}{nearest(name, missing)}" for name in unexpected[:_LISTED]]
    return [f"in the file, but not in the model ({len(unexpected)}):", *lines, *_rest(unexpected)]


def _shape_problems(misshapen: Sequence[Misshapen]) -> list[str]:
    if not misshapen:
        return []
    lines = [f"  {entry}" for entry in misshapen[:_LISTED]]
    problems = [f"other shape ({len(misshapen)}):", *lines, *_rest(misshapen)]
    vocabulary = next((entry for entry in misshapen if entry.counts_tokens), None)
    if vocabulary is not None:
        problems.append(
            f"The file was made with a vocabulary of {vocabulary.file_shape[0]} tokens, the model has "
            f"{vocabulary.model_shape[0]}: give the vocabulary the file was trained with, or --resize_vocab to copy "
            "the rows both have and initialise the others."
        )
    return problems


def _rest(entries: Sequence[object]) -> list[str]:
    return [f"  ... and {len(entries) - _LISTED} more"] if len(entries) > _LISTED else []


def _few(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
