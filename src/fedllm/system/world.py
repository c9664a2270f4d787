"""The world a federation runs in: how long things take and when clients are there."""

from __future__ import annotations

import math
from typing import Protocol


class World(Protocol):
    """Answers, for any client and at any time, from (seed, client) alone; nothing is stored."""

    def window(self, cid: int, time_s: float) -> tuple[float, float] | None:
        """Return the first availability window (open_s, close_s) that ends after `time_s`.

        A window that never closes ends at infinity. None means the client never comes back.
        """

    def fit_s(self, cid: int, steps: int) -> float:
        """Return the seconds that this many local steps take on the client's device."""

    def download_s(self, cid: int, nbytes: int) -> float:
        """Return the seconds that receiving this many bytes takes."""

    def upload_s(self, cid: int, nbytes: int) -> float:
        """Return the seconds that sending this many bytes takes."""


class Ideal:
    """Infinitely fast devices and links, always available: prototype mode."""

    def window(self, cid: int, time_s: float) -> tuple[float, float] | None:
        """Return a window that is always open."""
        return (0.0, math.inf)

    def fit_s(self, cid: int, steps: int) -> float:
        """Return zero: training takes no virtual time."""
        return 0.0

    def download_s(self, cid: int, nbytes: int) -> float:
        """Return zero: links are infinitely fast."""
        return 0.0

    def upload_s(self, cid: int, nbytes: int) -> float:
        """Return zero: links are infinitely fast."""
        return 0.0
