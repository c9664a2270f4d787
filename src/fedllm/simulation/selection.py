"""Who is sent for: drawn among all clients, and by default only among those who are there.

Nobody is listed: a draw is asked for its windows, and drawn again where it is absent. So a cohort
costs what its size is, whatever the population.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedllm.federation import BaseServer, ClientId
from fedllm.seeding import rng
from fedllm.system import World

MOST_DRAWS = 32
"""How often is drawn again for those still lacking."""
_FEWEST, _MOST = 16, 4
"""Least clients in a second or later draw, and most in any, in cohorts."""
_MARGIN = 1.5
"""Square roots of their number by which more are drawn than should be enough: draws are few."""


Chosen = tuple[ClientId, tuple[float, float]]
"""A client that is sent for, and when the window that it comes in opens and closes."""


@dataclass
class Selection:
    """How clients are chosen.

    Of `available`, those inside a window are taken, in the order of drawing. Where too few of
    `MOST_DRAWS` draws are, those of them whose windows open next are waited for. Of `any`, the
    first draw is taken as it is and waited for.
    """

    world: World
    pool: Sequence[ClientId]
    policy: Literal["available", "any"] = "available"
    seed: int = 0
    _order: tuple[int, np.ndarray] | None = field(default=None, repr=False)
    """The last cycle that was walked through, and its order."""

    def choose(
        self,
        server: BaseServer,
        count: int,
        now_s: float,
        stream: np.random.Generator,
        is_free: Callable[[ClientId], bool] | None = None,
    ) -> list[Chosen]:
        """Return clients with their windows, in the order in which they were drawn.

        They are less than `count` where so many are not free or will never come again; some
        servers sample another number.

        Args:
            server: Says how it samples.
            count: How many are wanted.
            now_s: Virtual time.
            stream: Random stream of all draws, one after another.
            is_free: Tells who may be chosen; absent: everyone.
        """
        # some methods have an order of their own; of `any`, who is there must make no difference
        is_repeated = server.is_random_cohort and (self.policy != "any" or is_free is not None)
        size = self._first_draw(count) if is_repeated else count
        drawn = server.sample(self.pool, size, stream)
        is_repeated &= len(drawn) == size < len(self.pool)  # a stage may ask everyone
        there, absent, seen = list[Chosen](), list[Chosen](), set[ClientId]()
        most = count if is_repeated else len(drawn)
        for draw in range(MOST_DRAWS):
            fresh = [cid for cid in drawn if cid not in seen] if seen else drawn
            seen.update(fresh)
            free = fresh if is_free is None else [cid for cid in fresh if is_free(cid)]
            self._ask(free, now_s, there, absent, most)
            is_enough = len(there) >= count or len(seen) >= len(self.pool)
            if not is_repeated or is_enough or draw == MOST_DRAWS - 1:
                break
            size = _enough(count - len(there), len(there) / len(seen), _MOST * count)
            drawn = server.sample(self.pool, max(size, _FEWEST), stream)
        if is_repeated and len(there) < count:
            absent.sort(key=_opening)  # among equals, whoever was drawn first
        return [*there, *absent][: count if is_repeated else None]

    def _first_draw(self, count: int) -> int:
        """Return how many to draw for so many who are there, by the share that is expected."""
        share = 1.0 if self.policy == "any" else self.world.presence
        if count >= len(self.pool) or share >= 1.0:
            return count
        return min(_enough(count, share, _MOST * count), len(self.pool) - 1)

    def walk(self, walked: int, now_s: float, is_reshuffled: bool) -> tuple[int, list[Chosen]]:
        """Return the next client of an order of all, whoever will never come being passed over.

        Args:
            walked: How many clients have been passed.
            now_s: Virtual time.
            is_reshuffled: Draw a new order when all have had their turn.

        Returns:
            How many have been passed then, and the client; none if `MOST_DRAWS` will never come.
        """
        for place in range(walked, walked + MOST_DRAWS):
            cycle, index = divmod(place, len(self.pool))
            cycle = cycle if is_reshuffled else 0
            if self._order is None or self._order[0] != cycle:
                stream = rng(self.seed, "sequence", cycle)
                self._order = cycle, stream.permutation(len(self.pool))
            cid = self.pool[int(self._order[1][index])]
            window = self.world.window(cid, now_s)
            if window is not None:
                return place + 1, [(cid, window)]
        return walked, []

    def _ask(
        self,
        cids: Sequence[ClientId],
        now_s: float,
        there: list[Chosen],
        absent: list[Chosen],
        most: int,
    ) -> None:
        """Add clients to those who are there and those who will be; some will never come.

        Once `most` are there, nobody else is asked.
        """
        latest_s = math.inf if self.policy == "any" else now_s
        for cid, window in zip(cids, self.world.windows(cids, now_s), strict=True):
            if window is None:
                continue
            if window[0] > latest_s:
                absent.append((cid, window))
                continue
            there.append((cid, window))
            if len(there) == most:
                break


def _opening(one: Chosen) -> float:
    return one[1][0]


def _enough(lacking: int, share: float, most: int) -> int:
    """Return how many to draw for so many who are there, at a share of those who are."""
    if not share:
        return most
    return min(math.ceil((lacking + _MARGIN * math.sqrt(lacking)) / share), most)
