"""Tiers of equally fast clients, for schedules that let each have rounds of its own."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedllm.federation import ClientId
from fedllm.seeding import rng, uniform

_LOOKED_AT = 1000
"""Clients by whose pace the tiers are divided."""


@dataclass
class Tiers:
    """Which tier a client belongs to: by its pace, the fastest first.

    The bounds come from a sample of the population, so that no list of it is needed. Clients of the
    same pace are divided evenly by chance.
    """

    seed: int
    pace_s: Callable[[ClientId], float]
    bounds: list[tuple[float, float]]
    """Between one tier and the next, in ascending order."""

    @classmethod
    def found(
        cls, count: int, pool: Sequence[ClientId], seed: int, pace_s: Callable[[ClientId], float]
    ) -> Tiers:
        """Divide a population into so many tiers of nearly equal size."""
        tiers = cls(seed, pace_s, [])
        chosen = rng(seed, "tiers").choice(len(pool), min(_LOOKED_AT, len(pool)), replace=False)
        keys = sorted(tiers._key(pool[int(i)]) for i in chosen)
        tiers.bounds = [keys[len(keys) * tier // count] for tier in range(1, count)]
        return tiers

    def of(self, cid: ClientId) -> int:
        """Return a client's tier, from 0."""
        return bisect.bisect_right(self.bounds, self._key(cid))

    def _key(self, cid: ClientId) -> tuple[float, float]:
        return self.pace_s(cid), uniform(self.seed, "tier", cid)
