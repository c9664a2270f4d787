"""The world a federation runs in: how long things take, and when clients are there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol


class Work(NamedTuple):
    """Local training that a job asks for, as a cost model sees it."""

    steps: int
    """Optimiser steps of one pass."""
    passes: float
    """How many such passes the algorithm makes; a gradient over all rows is a part of one."""
    tokens_per_step: float
    """Mean tokens, padding not counted, that one step goes over."""
    rank: int
    """The client's LoRA rank."""


class World(Protocol):
    """Answers, for any client and at any time, from (seed, client) alone.

    No answer depends on what was asked before; caches may only make it faster. Times are virtual
    seconds from the start of the run.
    """

    @property
    def presence(self) -> float:
        """About which share of the clients is there at any time: how many to draw for a cohort."""
        return 1.0

    def window(self, cid: int, time_s: float) -> tuple[float, float] | None:
        """Return the first availability window (open_s, close_s) that ends after `time_s`.

        A window that never closes ends at infinity. None means the client never comes back.
        """

    def windows(self, cids: Sequence[int], time_s: float) -> Iterable[tuple[float, float] | None]:
        """Return what `window` returns, of several clients in turn; not all of it may be read.

        A world that inherits this one answers them one by one, as they are read.
        """
        return (self.window(cid, time_s) for cid in cids)

    def fit_s(self, cid: int, work: Work) -> float:
        """Return the seconds that this work takes on the client's device, loading included."""

    def download_s(self, cid: int, nbytes: int, time_s: float, sharing: int) -> float:
        """Return the seconds that receiving takes, if it begins at `time_s`.

        `sharing` is how many transfers go on in the client's cell at that moment, its own included.
        """

    def upload_s(self, cid: int, nbytes: int, time_s: float, sharing: int) -> float:
        """Return the seconds that sending takes; see `download_s`."""

    def cell(self, cid: int) -> int | None:
        """Return the cell whose capacity the client shares; None if it shares with nobody."""

    def drops_after_s(self, cid: int, job: int, busy_s: float) -> float:
        """Return after how many seconds of work a client is gone; infinity if it stays.

        Args:
            cid: The client.
            job: Number of the job, so that each has its own fate.
            busy_s: Seconds that download, training and upload would take.
        """

    def energy_j(self, cid: int, train_s: float, download_s: float, upload_s: float) -> float:
        """Return the joules that so many seconds of work cost the client."""


class Ideal(World):
    """Infinitely fast devices and links, always available: prototype mode."""

    def window(self, cid: int, time_s: float) -> tuple[float, float] | None:
        """Return a window that is always open."""
        return (0.0, math.inf)

    def fit_s(self, cid: int, work: Work) -> float:
        """Return zero: training takes no virtual time."""
        return 0.0

    def download_s(self, cid: int, nbytes: int, time_s: float, sharing: int) -> float:
        """Return zero: links are infinitely fast."""
        return 0.0

    def upload_s(self, cid: int, nbytes: int, time_s: float, sharing: int) -> float:
        """Return zero: links are infinitely fast."""
        return 0.0

    def cell(self, cid: int) -> int | None:
        """Return None: nobody shares anything."""
        return None

    def drops_after_s(self, cid: int, job: int, busy_s: float) -> float:
        """Return infinity: nobody leaves."""
        return math.inf

    def energy_j(self, cid: int, train_s: float, download_s: float, upload_s: float) -> float:
        """Return zero: work costs nothing."""
        return 0.0
