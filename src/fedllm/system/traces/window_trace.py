"""Windows of many clients in flat arrays, and the question who is there."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedllm.errors import DataError

Window = tuple[float, float]
Unknown = Literal["unavailable", "available", "wrap"]
_FEW = 32
"""Fewer clients than these are asked one by one, which is then faster."""


@dataclass(frozen=True)
class WindowTrace:
    """When each of many clients is there.

    Memory: two numbers a window and up to five a client; whole seconds take four bytes. A question
    costs a bisection; a hundred asked together share its steps.

    Client k's windows lie at `offsets[k]` to `offsets[k + 1]`, in ascending order, not touching,
    within its period, which begins at `starts[k]` and comes again after `periods[k]` seconds; where
    that is infinite, nothing comes again.
    """

    names: Sequence[object]
    """What the trace calls its clients; may be a range for numbers."""
    opens: np.ndarray
    closes: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    periods: np.ndarray
    span_s: float
    """Virtual seconds that the trace covers."""
    source: str = ""
    _views: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    _periodic: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)
    """Starts, periods (1 where they are of no length, and nobody is there), and after how many
    seconds windows come again: 0 where nothing does."""
    _stride: int = field(default=0, repr=False, compare=False)
    """The first step of a bisection among the most windows that a client has."""

    def __post_init__(self) -> None:
        """Make views that plain Python reads fast."""
        arrays: tuple[Any, ...] = (self.opens, self.closes, self.offsets)
        views = [np.ascontiguousarray(array).data for array in arrays]
        starts, periods = _shared(self.starts), _shared(self.periods)
        views += [starts.data, periods.data]
        object.__setattr__(self, "_views", tuple(views))
        repeats = _shared(np.where(np.isinf(self.periods), 0.0, self.periods))
        lengths = _shared(np.where(self.periods == 0.0, 1.0, self.periods))
        object.__setattr__(self, "_periodic", (starts, lengths, repeats))
        most = int(np.diff(self.offsets).max(initial=0))
        object.__setattr__(self, "_stride", 1 << most.bit_length() >> 1)

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return len(self.offsets) - 1

    @property
    def num_windows(self) -> int:
        """How many windows there are in all."""
        return len(self.opens)

    @cached_property
    def presence(self) -> float:
        """The share of clients that is there, over periods or, where nothing repeats, the span."""
        is_whole = self.closes.dtype.kind == "i"  # and so within the span: no copy is needed
        ends = self.closes if is_whole else np.minimum(self.closes, self.span_s)
        there_s = ends.sum(dtype=float) - self.opens.sum(dtype=float)
        covered_s = np.where(np.isinf(self.periods), self.span_s, self.periods).sum()
        return float(min(there_s / covered_s, 1.0)) if covered_s > 0.0 else 1.0

    def window(self, index: int, time_s: float) -> Window | None:
        """Return the first window of a client that ends after `time_s`; None if there is none.

        A window that reaches the end of the period and one that begins with it are one.
        """
        opens, closes, offsets, starts, periods = self._views
        low, high = offsets[index], offsets[index + 1]
        if low == high:
            return None
        period = periods[index]
        if period == math.inf:
            place = bisect_right(closes, time_s, low, high)
            return None if place == high else (float(opens[place]), float(closes[place]))
        start = starts[index]
        since = time_s - start
        turn = since // period
        place = bisect_right(closes, start + since % period, low, high)
        if low < place < high - 1:  # neither the first nor the last: the most, and no seam is near
            shift = turn * period
            close_s = closes[place] + shift
            if close_s > time_s:
                return opens[place] + shift, close_s
        if place == high:
            turn, place = turn + 1.0, low
        while closes[place] + turn * period <= time_s:  # rounding, at the very end of a window
            turn, place = (turn, place + 1) if place + 1 < high else (turn + 1.0, low)
        shift, end = turn * period, start + period
        open_s, close_s = opens[place] + shift, closes[place] + shift
        if opens[low] <= start and closes[high - 1] >= end:
            if high - low == 1:
                return min(start, time_s), math.inf
            if place == high - 1:
                close_s = closes[low] + shift + period
            elif place == low:
                open_s = opens[high - 1] + shift - period
        return open_s, close_s

    def windows(self, indices: Sequence[int], time_s: float) -> Iterable[Window | None]:
        """Return what `window` returns, of several clients.

        Most are answered together; those at the seam of their period are asked one by one.
        """
        if len(indices) < _FEW or not self.num_windows:
            return (self.window(index, time_s) for index in indices)
        index = np.array(indices)
        low, high = self.offsets.take(index), self.offsets.take(index + 1)
        starts, periods, repeats = (_of(values, index) for values in self._periodic)
        since = time_s - starts
        place = self._bisected(low, high, starts + since % periods)
        opens, closes = (edges.take(place, mode="clip") for edges in (self.opens, self.closes))
        is_at_seam = (opens <= starts) | (closes >= starts + periods) | (place == high)
        shift = since // periods * repeats
        opens, closes = opens + shift, closes + shift
        found: list[Window | None] = list(zip(opens.tolist(), closes.tolist(), strict=True))
        is_at_seam |= closes <= time_s  # rounding, at the very end of a window
        for nth in is_at_seam.nonzero()[0].tolist():
            found[nth] = self.window(indices[nth], time_s)
        return found

    def _bisected(self, low: np.ndarray, high: np.ndarray, within: Any) -> np.ndarray:
        """Return the first window of each client that ends after a time, or where its last ends."""
        place, top, step = low.copy(), high - 1, self._stride
        while step:
            # beyond the last window stands for the last: where that is over, all are
            is_over = self.closes.take(np.minimum(place + (step - 1), top)) <= within
            place += is_over * step
            step >>= 1
        return place.clip(max=high)

    def is_available(self, index: int, time_s: float) -> bool:
        """Tell whether a client is there."""
        found = self.window(index, time_s)
        return found is not None and found[0] <= time_s

    def listed(self, index: int) -> list[Window]:
        """Return a client's windows in its first period."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        opens, closes = self.opens[part].astype(float), self.closes[part].astype(float)
        return list(zip(opens.tolist(), closes.tolist(), strict=True))

    def share_available(self, times_s: Sequence[float]) -> list[float]:
        """Return which part of the clients is there at each of some times."""
        lengths = np.diff(self.offsets)
        shares = []
        for time_s in times_s:
            # a remainder by infinity is the time itself
            within = self.starts + np.mod(time_s - self.starts, self.periods)
            asked = np.repeat(within, lengths)
            is_there = (self.opens <= asked) & (asked < self.closes)
            shares.append(float(is_there.sum()) / max(self.num_clients, 1))
        return shares

    @classmethod
    def from_arrays(
        cls,
        opens: np.ndarray,
        closes: np.ndarray,
        offsets: np.ndarray,
        span_s: float,
        *,
        wraps: bool = True,
    ) -> WindowTrace:
        """Return the trace of clients that all have the same period; the arrays are not copied.

        Raises:
            DataError: If a window is empty, out of order, or not within 0 and `span_s`.
        """
        place = first_wrong(opens, closes, offsets)
        if place is None and len(opens):
            beyond = (opens < 0) | (closes > span_s)
            place = int(beyond.argmax()) if beyond.any() else None
        if place is not None:
            raise DataError(
                f"window {place} of a trace, from {opens[place]} to {closes[place]} s, must open"
                f" before it closes, after the client's last one ends, and within 0 to {span_s} s"
            )
        count = len(offsets) - 1
        periods = np.full(count, span_s if wraps else math.inf)
        return cls(range(count), opens, closes, offsets, np.zeros(count), periods, span_s)

    @classmethod
    def of(
        cls,
        windows: Mapping[str, Sequence[Window]],
        span_s: float,
        *,
        wraps: bool = True,
        coverage: Mapping[str, Window] | None = None,
        unknown: Unknown = "wrap",
        source: str = "",
    ) -> WindowTrace:
        """Return the trace of these clients.

        Args:
            windows: Client to its windows; those that overlap or touch become one, and what lies
                outside of the client's coverage is left out.
            span_s: What the trace covers, from 0.
            wraps: Whether it comes again after that.
            coverage: Client to the stretch in which something is known of it; absent: all.
            unknown: What holds outside of it; `wrap` lets it come again and again.
            source: What the trace was made of.
        """
        opens, closes, starts, periods = (list[float]() for _ in range(4))
        offsets = [0]
        for name, own in windows.items():
            low, high = (coverage or {}).get(name, (0.0, span_s))
            merged = merge([(max(open_s, low), min(close_s, high)) for open_s, close_s in own])
            is_own_turn = unknown == "wrap" and wraps
            if unknown == "available":
                merged = merge([*merged, (0.0, low), (high, span_s if wraps else math.inf)])
            opens += [open_s for open_s, _ in merged]
            closes += [close_s for _, close_s in merged]
            offsets.append(len(opens))
            starts.append(low if is_own_turn else 0.0)
            periods.append(high - low if is_own_turn else span_s if wraps else math.inf)
        first, period = np.array(starts, np.float64), np.array(periods, np.float64)
        begins, ends = (compact(np.array(edges, np.float64)) for edges in (opens, closes))
        return cls(list(windows), begins, ends, np.array(offsets), first, period, span_s, source)

    @classmethod
    def load(cls, path: Path) -> WindowTrace:
        """Read a trace in our own format, JSONL or Parquet.

        Raises:
            ConfigError: If it is not there or not in our format.
        """
        from fedllm.system.traces.own_format import read_trace

        return read_trace(path)


def merge(windows: Sequence[Window]) -> list[Window]:
    """Return windows in order, those that overlap or touch as one, those without length left out.

    >>> merge([(5.0, 6.0), (0.0, 2.0), (2.0, 3.0), (4.0, 4.0)])
    [(0.0, 3.0), (5.0, 6.0)]
    """
    merged: list[Window] = []
    for open_s, close_s in sorted(windows):
        if close_s <= open_s:
            continue
        if merged and open_s <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(close_s, merged[-1][1])
        else:
            merged.append((open_s, close_s))
    return merged


def first_wrong(opens: np.ndarray, closes: np.ndarray, offsets: np.ndarray) -> int | None:
    """Return a window that is empty or that its client's last one overlaps or touches, if any is.

    Clients' windows lie one after another, as in `WindowTrace`.
    """
    is_wrong = opens >= closes
    is_early = opens[1:] <= closes[:-1]
    is_early[offsets[(offsets > 0) & (offsets < len(opens))] - 1] = False  # of another client
    is_wrong[1:] |= is_early
    return int(is_wrong.argmax()) if is_wrong.any() else None


def _shared(values: np.ndarray) -> np.ndarray:
    """Return equal values as one that stands for all: it stays in the processor's cache."""
    first = values[:1]
    return np.broadcast_to(first, values.shape) if (values == first).all() else values


def _of(values: np.ndarray, index: np.ndarray) -> Any:
    """Return the values of some clients: one number, where all have the same."""
    return values.take(index) if values.strides[0] else float(values[0])


def compact(seconds: np.ndarray) -> np.ndarray:
    """Return whole seconds in half the memory, and others as they are."""
    if not seconds.size or not -(2**31) < seconds.min() <= seconds.max() < 2**31:
        return seconds
    whole = seconds.astype(np.int32)
    return whole if (whole == seconds).all() else seconds
