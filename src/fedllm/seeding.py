"""Named random streams: every random choice of a run follows from (seed, names), in any order.

The global generators of Python, numpy and torch are never used: a stream is asked for by name
(`rng(seed, "cohort", version)`), so no draw depends on which other draws came before it, on how
many workers there are, or on whether a run was resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_from_bytes = int.from_bytes
"""By a name of its own: a run has a seed for each job, and looking the method up takes time."""


def derive(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed that follows from `seed` and the names alone.

    It is the same on every platform and in every process (unlike `hash`).

    >>> derive(0, "cohort", 3) == derive(0, "cohort", 3) != derive(0, "cohort", 4)
    True
    """
    return _number(_hashed(seed, names))


class Numbered:
    """Seeds that follow from a seed, a name and two numbers: `derive`, with one half done before.

    >>> Numbered(0, "job").of(7, 3) == derive(0, "job", 7, 3)
    True
    """

    def __init__(self, seed: int, *names: str | int) -> None:
        self._begun = _hashed(seed, names)

    def of(self, first: int, second: int) -> int:
        """Return the seed of these numbers."""
        hashed = self._begun.copy()
        hashed.update(b"\x1fint:%d\x1fint:%d" % (first, second))
        return _from_bytes(hashed.digest(), "little") >> 1


def _hashed(seed: int, names: Sequence[str | int]) -> hashlib.blake2b:
    text = "\x1f".join([str(seed), *[f"{type(n).__name__}:{n}" for n in names]])
    return hashlib.blake2b(text.encode(), digest_size=8)


def _number(hashed: hashlib.blake2b) -> int:
    return _from_bytes(hashed.digest(), "little") >> 1


def rng(seed: int, *names: str | int) -> np.random.Generator:
    """Return the random stream with this name."""
    return np.random.default_rng(derive(seed, *names))


def uniform(seed: int, *names: str | int) -> float:
    """Return a number from [0, 1) that follows from `seed` and the names: one hash, no stream.

    >>> 0.0 <= uniform(0, "device", 3) < 1.0
    True
    """
    return (derive(seed, *names) >> 10) * 2.0**-53
