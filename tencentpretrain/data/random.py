"""Random numbers that follow from a key alone, so a sample does not depend on what was drawn before it."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

ORDER: Final = 1
PLAN: Final = 2
SAMPLE: Final = 3
"""What the numbers are for; streams of different purposes are independent."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class KeyedGenerator:
    """A NumPy generator that is moved to the stream of a key (Philox; Salmon et al., 2011, section 3).

    Args:
        seed: the seed of the run.
        purpose: one of the purposes above.
        salt: anything else that the streams depend on, such as the fingerprint of the data.
    """

    def __init__(self, seed: int, purpose: int, salt: int = 0) -> None:
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._key = np.array([seed & _MASK, (purpose ^ (salt << 8)) & _MASK], np.uint64)
        self._empty = np.zeros(4, np.uint64)

    def at(self, version: int, index: int) -> np.random.Generator:
        """Returns the generator at the beginning of the stream (version, index); valid until the next call."""
        self._bits.state = {
            "bit_generator": "Philox",
            "state": {"counter": np.array([0, 0, version, index], np.uint64), "key": self._key},
            "buffer": self._empty,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator


def uniforms(seed: int, version: int, draw: int, *keys: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """Returns one number in [0, 1) per key, for plans that draw for all documents at once.

    Args:
        draw: tells the numbers of one key apart.
        keys: broadcastable integers.
    """
    state = np.uint64(_mix_int(_mix_int(_mix_int(seed) ^ version) ^ ((PLAN << 32) | draw)))
    mixed: NDArray[np.uint64] = np.asarray(state, np.uint64)
    for key in keys:
        mixed = _mix(mixed ^ np.asarray(key).astype(np.uint64))
    numbers: NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al., 2014) after one step of its counter."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(_GOLDEN)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
        return mixed


def _mix_int(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
