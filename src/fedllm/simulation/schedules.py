"""When the server aggregates, and with which weights; how is the algorithm's business.

A schedule asks for clients in groups and says when a group is ready. The rounds of `Sync` are one
group after another, tiers are several at a time, and in `Buffered` and `Async` one group is always
open, into which the clients at work are counted anew after each aggregation.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from fedllm.federation import BaseServer, ClientId, Part, Update

_client = operator.attrgetter("cid")


class Order(NamedTuple):
    """Clients that a schedule asks for."""

    group: int
    size: int


@dataclass
class Group:
    """Clients whose updates are aggregated together."""

    asked: list[ClientId] = field(default_factory=list)
    """Who was sent for, in the order of sampling; empty in a stream, where nobody is asked once
    for all."""
    wanted: int = 0
    """How many updates are enough, or can still arrive, where it is not for all."""
    arrived: list[Update] = field(default_factory=list)
    missing: int = 0
    """How many of those asked will not arrive, or were rejected."""
    is_due: bool = False
    """Whether its deadline has passed."""


@dataclass
class Schedule(ABC):
    """Groups of clients, and what becomes of their updates."""

    takes_changes: ClassVar[bool] = False
    """Whether a late update counts as a change of today's model, not as a model to be mixed in."""
    is_in_order: ClassVar[bool] = False
    """Whether clients are taken one after another, not drawn."""
    is_stream: ClassVar[bool] = False
    """Whether one group is always open, and clients work on beyond an aggregation."""

    groups: dict[int, Group] = field(default_factory=dict)
    """Those that are open."""
    made: dict[int, int] = field(default_factory=dict)
    """How many aggregations each group has made."""
    walked: int = 0
    """How many clients have been passed in order."""
    is_reshuffled: bool = False
    """Whether that order is drawn anew when it is through."""
    tiers: int = 1
    """Of clients that are equally fast; a group belongs to each."""

    @property
    def deadline_s(self) -> float | None:
        """Virtual seconds after which a group is aggregated with what there is."""
        return None

    @property
    def max_staleness(self) -> int | None:
        """How many versions late an update may be."""
        return None

    def is_stale(self, lateness: int) -> bool:
        """Tell whether an update that is so many versions late is of no use."""
        return self.max_staleness is not None and lateness > self.max_staleness

    @abstractmethod
    def orders(self, busy: int) -> list[Order]:
        """Return how many clients each group wants now, `busy` being at work or waited for."""

    @abstractmethod
    def is_ready(self, group: int) -> bool:
        """Tell whether the server can aggregate a group."""

    @abstractmethod
    def weights(self, group: int, server: BaseServer, updates: Sequence[Update]) -> list[float]:
        """Return the weight of each update; the rest of 1 is today's model's."""

    def stream_name(self, group: int, version: int, dispatched: int) -> tuple[str | int, ...]:
        """Return the name of the random stream that draws the clients of an order."""
        return ("cohort", version)

    def room(self, group: int, rounds_left: int) -> int | None:
        """Return how many more updates can be used of those sent for so far; None for any number.

        Args:
            group: Of those.
            rounds_left: Aggregations until the run ends, the next one included.
        """
        return None

    @property
    def ready(self) -> int | None:
        """The first group that the server can aggregate."""
        for group in self.groups:
            if self.is_ready(group):
                return group
        return None

    def begin(self, group: int, asked: Sequence[ClientId] = ()) -> None:
        """Open a group."""
        self.groups[group] = Group(list(asked))

    def receive(self, group: int, update: Update) -> bool:
        """Take an update that has arrived, and tell whether there may be something to do now."""
        self.groups[group].arrived.append(update)
        return True

    def miss(self, group: int) -> None:
        """Stop waiting for one client."""
        self.groups[group].missing += 1

    def parts(self, group: int, server: BaseServer) -> list[Part]:
        """Return the updates with their weights, in an order that no arrival time changes."""
        updates = sorted(self.groups[group].arrived, key=_client)
        weights = self.weights(group, server, updates) if updates else []
        return [Part(weight, update) for weight, update in zip(weights, updates, strict=True)]

    def close(self, group: int) -> None:
        """End a group that has been aggregated."""
        self.made[group] = self.made.get(group, 0) + 1
        del self.groups[group]


@dataclass
class Sync(Schedule):
    """Wait for the whole cohort, for the first of more than were needed, or until a deadline."""

    cohort_size: int = 1
    over_selection: float = 1.0
    min_updates: int = 1
    wait_s: float | None = None

    @property
    def deadline_s(self) -> float | None:
        """As set."""
        return self.wait_s

    def orders(self, busy: int) -> list[Order]:
        """Ask for a cohort when there is none."""
        return [] if self.groups else [Order(0, self._ordered)]

    def begin(self, group: int, asked: Sequence[ClientId] = ()) -> None:
        """Open a round; some algorithms ask for everyone, whatever the size of cohorts."""
        super().begin(group, asked)
        count = len(asked)
        self.groups[group].wanted = count if count > self._ordered else min(count, self.cohort_size)

    def room(self, group: int, rounds_left: int) -> int | None:
        """Return what is left of the cohort."""
        own = self.groups[group]
        return own.wanted - len(own.arrived)

    def receive(self, group: int, update: Update) -> bool:
        """Take an update; until the round is complete there is nothing to do but to wait."""
        own = self.groups[group]
        own.arrived.append(update)
        return len(own.arrived) >= own.wanted

    def miss(self, group: int) -> None:
        """Want no more than can still arrive."""
        super().miss(group)
        own = self.groups[group]
        own.wanted = min(own.wanted, len(own.asked) - own.missing)

    def is_ready(self, group: int) -> bool:
        """Tell whether enough have arrived, or no more will."""
        own = self.groups[group]
        return own.is_due or len(own.arrived) >= own.wanted

    def weights(self, group: int, server: BaseServer, updates: Sequence[Update]) -> list[float]:
        """Weigh by the server's weights, which are made to sum to 1."""
        return shares(server, updates)

    def parts(self, group: int, server: BaseServer) -> list[Part]:
        """Return nothing where too few have arrived."""
        found = super().parts(group, server)
        return found if len(found) >= self.min_updates else []

    @property
    def _ordered(self) -> int:
        return math.ceil(self.cohort_size * self.over_selection)


@dataclass
class Sequential(Sync):
    """One client after another: rounds of one, taken from an order of all clients."""

    is_in_order: ClassVar[bool] = True


@dataclass
class SemiSync(Schedule):
    """Tiers of equally fast clients, each with rounds of its own."""

    takes_changes: ClassVar[bool] = True

    cohort_size: int = 2
    is_slow_first: bool = False

    def stream_name(self, group: int, version: int, dispatched: int) -> tuple[str | int, ...]:
        """Tiers may ask at the same version."""
        return ("cohort", version, "tier", group)

    def orders(self, busy: int) -> list[Order]:
        """Ask for a cohort for each tier that has none."""
        sizes = [self.cohort_size // self.tiers] * self.tiers
        for tier in range(self.cohort_size % self.tiers):
            sizes[tier] += 1
        return [
            Order(tier, max(size, 1)) for tier, size in enumerate(sizes) if tier not in self.groups
        ]

    def is_ready(self, group: int) -> bool:
        """Tell whether the tier's cohort is complete."""
        own = self.groups[group]
        return len(own.arrived) + own.missing >= len(own.asked)

    def weights(self, group: int, server: BaseServer, updates: Sequence[Update]) -> list[float]:
        """Divide the tier's weight among its updates."""
        own = self._tier_weight(group)
        return [own * share for share in shares(server, updates)]

    def _tier_weight(self, tier: int) -> float:
        """Return 1 / tiers, or the share of updates that the tier opposite in speed has made."""
        counts = [self.made.get(other, 0) for other in range(self.tiers)]
        if not self.is_slow_first or not sum(counts):
            return 1.0 / self.tiers
        # one more each, so that a tier whose opposite has never made an update counts, too
        return (counts[self.tiers - 1 - tier] + 1) / (sum(counts) + self.tiers)


def shares(server: BaseServer, updates: Sequence[Update]) -> list[float]:
    """Return the server's weights of updates, made to sum to 1."""
    weights = [server.weight(update) for update in updates]
    total = sum(weights) or 1.0
    return [weight / total for weight in weights]
