"""Learning-rate schedules: pure functions of the number of updates already made.

Each returns the multiplier of the base rate for the update after `update` earlier ones, so warm-up starts at 0.
`Course` holds what a schedule may depend on. Lengths count optimizer updates and may be fractional, as the share of the
total that a user gives need not be a whole number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tencentpretrain.registry import SCHEDULES

_SMALLEST_RATE = 1e-7
"""The learning rate (not the multiplier) at which `polynomial` and `inverse_sqrt` end."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """The length of a run in updates.

    Fields:
        total: all updates.
        warmup: updates during which the rate rises.
        decay: updates at the end during which `tri_stage` falls.
        learning_rate: the base rate, for schedules that end at an absolute rate.
    """

    total: int
    warmup: float = 0.0
    decay: float = 0.0
    learning_rate: float = 1.0

    @property
    def end(self) -> float:
        """The multiplier that gives the smallest rate."""
        return _SMALLEST_RATE / self.learning_rate if self.learning_rate > _SMALLEST_RATE else 1.0

    def rise(self, update: int) -> float:
        """The multiplier during warm-up."""
        return update / max(1.0, self.warmup)

    def progress(self, update: int) -> float:
        """The share of the course after warm-up that lies behind."""
        return (update - self.warmup) / max(1.0, self.total - self.warmup)


@SCHEDULES.register("constant")
def constant(update: int, course: Course) -> float:
    """The base rate throughout."""
    return 1.0


@SCHEDULES.register("constant_with_warmup")
def constant_with_warmup(update: int, course: Course) -> float:
    """Rises to the base rate and stays."""
    return course.rise(update) if update < course.warmup else 1.0


@SCHEDULES.register("linear")
def linear(update: int, course: Course) -> float:
    """Rises, then falls on a line to 0 at the end."""
    if update < course.warmup:
        return course.rise(update)
    return max(0.0, (course.total - update) / max(1.0, course.total - course.warmup))


@SCHEDULES.register("cosine")
def cosine(update: int, course: Course) -> float:
    """Rises, then falls on half a cosine; beyond the end it rises again."""
    if update < course.warmup:
        return course.rise(update)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * course.progress(update))))


@SCHEDULES.register("cosine_with_restarts")
def cosine_with_restarts(update: int, course: Course) -> float:
    """Rises, then falls on half a cosine in one cycle, and is 0 beyond the end (Loshchilov and Hutter, 2017)."""
    if update < course.warmup:
        return course.rise(update)
    return cosine(update, course) if course.progress(update) < 1.0 else 0.0


@SCHEDULES.register("polynomial")
def polynomial(update: int, course: Course) -> float:
    """Rises, then falls on a line to a rate of 1e-7, where it stays."""
    if update < course.warmup:
        return course.rise(update)
    if update > course.total or course.total == course.warmup:
        return course.end
    remaining = 1.0 - (update - course.warmup) / (course.total - course.warmup)
    return (1.0 - course.end) * remaining + course.end


@SCHEDULES.register("inverse_sqrt")
def inverse_sqrt(update: int, course: Course) -> float:
    """Rises, then falls with the root of the update number (Vaswani et al., 2017, section 5.3); 1e-7 beyond the end.

    Without warm-up it starts at the base rate and falls as if the first update had been the warm-up.
    """
    if update < course.warmup:
        return update / course.warmup
    if update > course.total:
        return course.end
    warmup = course.warmup or 1.0
    return math.sqrt(warmup / max(update, warmup))


@SCHEDULES.register("tri_stage")
def tri_stage(update: int, course: Course) -> float:
    """Rises from 1 % to the base rate, stays, and falls exponentially to 5 % (Park et al., 2019, arXiv:1904.08779).

    Without warm-up it starts at the base rate.
    """
    if update < course.warmup:
        return 0.01 + update * 0.99 / course.warmup
    if update < course.total - course.decay:
        return 1.0
    if update <= course.total:
        since = update - (course.total - course.decay)
        return math.exp(math.log(0.05) / max(course.decay, 1.0) * since)
    return 0.05
