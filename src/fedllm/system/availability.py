"""When clients are there: each answer follows from (seed, client, time), and nothing is walked."""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np

from fedllm.config import Always, Availability, Diurnal, DropoutConfig, Intermittent, Traced
from fedllm.seeding import rng, uniform

Window = tuple[float, float]
_KNOWN = 4096
"""Clients whose windows are remembered."""
_PERIOD_WINDOWS = 32
"""Windows of an intermittent client before they repeat."""
_DAY_S, _HOUR_S = 86400.0, 3600.0
_DAYS_SEARCHED = 400
_LENGTH_SPREAD = 0.25


class Windows(ABC):
    """Answers when a client is there; see `World`."""

    @property
    def presence(self) -> float:
        """About which share of the clients is there at any time."""
        return 1.0

    @abstractmethod
    def window(self, cid: int, time_s: float) -> Window | None:
        """Return the first window that ends after `time_s`."""

    def windows(self, cids: Sequence[int], time_s: float) -> Iterable[Window | None]:
        """Return the same of several clients, asked as they are read."""
        return (self.window(cid, time_s) for cid in cids)


class AlwaysThere(Windows):
    """Everyone, all the time."""

    def window(self, cid: int, time_s: float) -> Window | None:
        """Return a window that never closes."""
        return 0.0, math.inf


@dataclass(frozen=True)
class Renewals(Windows):
    """Windows and the times between them are drawn; after 32 of them they repeat.

    Where a client is in its period at time 0 is drawn, too, so that the share of clients that are
    there is on_s / (on_s + off_s) at any time.
    """

    config: Intermittent
    seed: int
    _period: Callable[[int], tuple[list[float], list[float], float, float]] = field(init=False)

    def __post_init__(self) -> None:
        """Remember the clients that are asked for most."""
        object.__setattr__(self, "_period", lru_cache(_KNOWN)(self._drawn))

    @property
    def presence(self) -> float:
        """The share of time within windows."""
        return self.config.on_s / (self.config.on_s + self.config.off_s)

    def window(self, cid: int, time_s: float) -> Window | None:
        """Return the first window that ends after `time_s`."""
        opens, closes, length, shift = self._period(cid)
        turn, within = divmod(time_s + shift, length)
        index = bisect.bisect_right(closes, within)
        if index == len(closes):  # the last of this turn is over
            turn, index = turn + 1, 0
        start = turn * length - shift
        if start + closes[index] <= time_s:  # rounding at the very end of a window
            turn, index = (turn, index + 1) if index + 1 < len(closes) else (turn + 1, 0)
            start = turn * length - shift
        return start + opens[index], start + closes[index]

    def _drawn(self, cid: int) -> tuple[list[float], list[float], float, float]:
        """Return openings, closings, length of the period, and where in it time begins."""
        stream = rng(self.seed, "availability", cid)
        on = self._durations(stream, self.config.on_s)
        off = self._durations(stream, self.config.off_s)
        ends = np.cumsum(on + off)
        opens = ends - on
        return opens.tolist(), ends.tolist(), float(ends[-1]), float(stream.random() * ends[-1])

    def _durations(self, stream: np.random.Generator, mean_s: float) -> np.ndarray:
        match self.config.distribution:
            case "exponential":
                found = stream.exponential(mean_s, _PERIOD_WINDOWS)
            case "lognormal":
                found = stream.lognormal(math.log(mean_s) - 0.5, 1.0, _PERIOD_WINDOWS)
            case "constant":
                found = np.full(_PERIOD_WINDOWS, mean_s)
        return np.maximum(found, 1.0)


@dataclass(frozen=True)
class Days(Windows):
    """A window on each day on which a client comes, by its local time."""

    config: Diurnal
    seed: int

    @property
    def presence(self) -> float:
        """The share of a week within windows."""
        weekend = self.config.weekend_chance
        weekend = self.config.chance if weekend is None else weekend
        return self.config.hours / 24.0 * (5 * self.config.chance + 2 * weekend) / 7

    def window(self, cid: int, time_s: float) -> Window | None:
        """Return the first window that ends after `time_s`; None after 400 days without one."""
        zone = self.zone(cid)
        today = math.floor((time_s / _HOUR_S + zone) / 24.0)
        for day in range(today - 2, today + _DAYS_SEARCHED):
            found = self._on(cid, day, zone)
            if found is not None and found[1] > time_s:
                return found
        return None

    def zone(self, cid: int) -> float:
        """Return how many hours a client is ahead of UTC."""
        zones = self.config.time_zones
        return zones[int(uniform(self.seed, "time zone", cid) * len(zones))]

    def _on(self, cid: int, day: int, zone: float) -> Window | None:
        """Return the window that opens on a day of virtual time, which may have begun before 0."""
        config = self.config
        is_weekend = (config.start_weekday + day) % 7 >= 5
        chance = config.chance
        if is_weekend and config.weekend_chance is not None:
            chance = config.weekend_chance
        if uniform(self.seed, "day", cid, day) >= chance:
            return None
        early = (uniform(self.seed, "opening", cid, day) - 0.5) * 2 * config.spread_hours
        length = config.hours * (
            1 + _LENGTH_SPREAD * (2 * uniform(self.seed, "length", cid, day) - 1)
        )
        # no window may reach into the next day's
        length = min(length, 24.0 - 2 * config.spread_hours - 1e-3)
        open_s = (24.0 * day + config.start_hour + early - zone) * _HOUR_S
        return open_s, open_s + length * _HOUR_S


class Trace(Protocol):
    """Windows of many clients by index; `fedllm.system.traces.WindowTrace` is one."""

    @property
    def num_clients(self) -> int:
        """How many clients there are."""

    @property
    def presence(self) -> float:
        """The share of clients that is there, over the whole of the trace."""

    def window(self, index: int, time_s: float) -> Window | None:
        """Return the first window of a client that ends after `time_s`."""

    def windows(self, indices: Sequence[int], time_s: float) -> Iterable[Window | None]:
        """Return the same of several clients."""


@dataclass(frozen=True)
class FromTrace(Windows):
    """Windows as a trace has them."""

    trace: Trace
    is_drawn: bool
    seed: int

    @property
    def presence(self) -> float:
        """As in the trace."""
        return self.trace.presence

    def window(self, cid: int, time_s: float) -> Window | None:
        """Return the first window that ends after `time_s`."""
        return self.trace.window(self._index(cid), time_s)

    def windows(self, cids: Sequence[int], time_s: float) -> Iterable[Window | None]:
        """Return the same of several clients, whom the trace answers together."""
        return self.trace.windows([self._index(cid) for cid in cids], time_s)

    def _index(self, cid: int) -> int:
        """Return the client of the trace that a client takes after."""
        count = self.trace.num_clients
        return int(uniform(self.seed, "trace", cid) * count) if self.is_drawn else cid % count


def windows_of(config: Availability, seed: int) -> Windows:
    """Return when clients are there.

    Raises:
        ConfigError: If a trace cannot be read.
    """
    match config:
        case Intermittent():
            return Renewals(config, seed)
        case Diurnal():
            return Days(config, seed)
        case Traced():
            from fedllm.system.traces import WindowTrace

            return FromTrace(WindowTrace.load(config.path), config.assignment == "drawn", seed)
        case Always():
            return AlwaysThere()


def leaves_after_s(config: DropoutConfig, seed: int, cid: int, job: int, busy_s: float) -> float:
    """Return after how many seconds of work a client leaves; see `World.drops_after_s`."""
    leaves_s = math.inf
    if config.per_job and uniform(seed, "drops", cid, job) < config.per_job:
        leaves_s = busy_s * uniform(seed, "drops at", cid, job)
    if config.per_hour:
        u = uniform(seed, "leaves", cid, job)
        leaves_s = min(leaves_s, -math.log1p(-u) / config.per_hour * _HOUR_S)
    return leaves_s
