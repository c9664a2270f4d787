"""Spans of virtual time: joined, and counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join spans that overlap or touch.

    >>> merged([(5, 8), (0, 2), (1, 4)])
    [(0, 4), (5, 8)]
    """
    found: list[tuple[float, float]] = []
    for low, high in sorted(spans):
        if found and low <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], high)
        else:
            found.append((low, high))
    return found


def middles(end_s: float, steps: int) -> list[float]:
    """Return the middles of `steps` equal parts of the time from 0 to `end_s`."""
    return [end_s * (step + 0.5) / steps for step in range(steps)]


def mean_count(spans: Sequence[tuple[float, float]], end_s: float, steps: int) -> list[float]:
    """Return how many spans cover each of `steps` equal parts of the time, on average; exact."""
    if not spans or not end_s:
        return [0.0] * steps
    edges = np.linspace(0.0, end_s, steps + 1)
    covered = np.zeros(steps + 1)
    # seconds that lie before a time: those since each beginning, less those since each end
    for times, sign in zip(np.sort(np.array(spans, dtype=float), axis=0).T, (1, -1), strict=True):
        begun = np.searchsorted(times, edges)
        sums = np.concatenate([[0.0], np.cumsum(times)])
        covered += sign * (begun * edges - sums[begun])
    found: list[float] = np.maximum(np.diff(covered) * steps / end_s, 0.0).tolist()
    return found
