"""Drawing one of several by weight, from a number that is uniform on [0, 1)."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

NORMAL = NormalDist()
_INSIDE = 1e-12


@dataclass(frozen=True)
class Choice:
    """Items with weights; the first of them lie at small numbers."""

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Add the weights up once."""
        total = sum(self.weights)
        ends = tuple(end / total for end in itertools.accumulate(self.weights))
        object.__setattr__(self, "_ends", (*ends[:-1], 1.0))

    def draw(self, u: float) -> tuple[int, float]:
        """Return which item a number falls on, and how far through it, from 0 to 1."""
        ends: Sequence[float] = self._ends  # type: ignore[attr-defined]  # set above: it is frozen
        index = min(bisect.bisect_right(ends, u), len(ends) - 1)
        low = ends[index - 1] if index else 0.0
        return index, (u - low) / (ends[index] - low)


def normal(u: float) -> float:
    """Return the standard normal number at this quantile, of an open interval."""
    return NORMAL.inv_cdf(min(max(u, _INSIDE), 1.0 - _INSIDE))


def correlated(u: float, other: float, correlation: float) -> float:
    """Return a uniform number that is correlated with `u` (a Gaussian copula).

    Args:
        u: Uniform.
        other: Uniform, independent of it.
        correlation: Of the normal numbers behind both, from -1 to 1.
    """
    rest = (1.0 - correlation**2) ** 0.5
    return NORMAL.cdf(correlation * normal(u) + rest * normal(other))
