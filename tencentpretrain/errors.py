"""Errors a user can act on. Each class carries the exit code that `entry` returns for it.

0 done, 1 unexpected, 2 usage or configuration, 3 input data, 4 checkpoint or model file refused, 5 resources,
6 non-finite numbers, 7 another process of the run failed, 130 interrupted, 143 terminated after a clean save.
"""

from __future__ import annotations

from collections.abc import Sequence


class TencentPretrainError(Exception):
    """The root of all errors that are sentences for a user: what happened, where, what to do."""

    exit_code = 1


class ConfigError(TencentPretrainError):
    """A flag, a key of a config file, or a combination of them is not usable.

    All problems of a run are collected before this is raised, so a user mends them in one go.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str], *, source: str | None = None) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        self.source = source
        super().__init__(self._text())

    def _text(self) -> str:
        if len(self.problems) == 1 and self.source is None:
            return self.problems[0]
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        head = f"{self.source}: {count}" if self.source else count
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


class MethodConflict(ConfigError):
    """Two methods or components were asked for that cannot work together."""


class DataFormatError(TencentPretrainError):
    """A corpus, data set, vocabulary or task file does not have the promised form."""

    exit_code = 3


class CheckpointMismatch(TencentPretrainError):
    """A checkpoint is damaged, is not a checkpoint, or does not fit the model."""

    exit_code = 4


class ResourceError(TencentPretrainError):
    """Disk, memory or a directory that must be ours alone is not available."""

    exit_code = 5


class NonFiniteError(TencentPretrainError):
    """A loss or gradient became NaN or infinite; the update was not made."""

    exit_code = 6


class NonFiniteGradientError(NonFiniteError):
    """The gradient is not finite though the losses are."""


class PeerError(TencentPretrainError):
    """Another process of this run failed, is missing, hangs or has other settings."""

    exit_code = 7
