"""The table: one row for each algorithm. A new algorithm adds a row here and no test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedllm.federation import MixedRank


@dataclass(frozen=True)
class Trip:
    """One client's part in one round: all that the closed forms of the byte counts depend on."""

    shapes: tuple[tuple[int, int], ...]
    """(out, in) of every adapted module."""
    rank: int
    """The client's rank."""
    version: int
    """Server version it downloads."""
    since: int
    """Server version it downloaded last; -1 at first contact."""
    stacks: tuple[int, ...]
    """Sum of ranks of the cohort whose updates made version 1, 2, ..., `version`."""

    @property
    def outs(self) -> int:
        """Sum of o over modules."""
        return sum(o for o, _ in self.shapes)

    @property
    def ins(self) -> int:
        """Sum of i over modules."""
        return sum(i for _, i in self.shapes)

    @property
    def made(self) -> range:
        """The versions made since the last contact."""
        return range(max(self.since, 0) + 1, self.version + 1)


Elements = Callable[[Trip], int]
"""How many numbers travel, heads not counted."""


def both(trip: Trip) -> int:
    """A and B of every module."""
    return trip.rank * (trip.outs + trip.ins)


def only_a(trip: Trip) -> int:
    """A of every module."""
    return trip.rank * trip.ins


def only_b(trip: Trip) -> int:
    """B of every module."""
    return trip.rank * trip.outs


def alternating(trip: Trip) -> int:
    """B in the rounds that make odd versions, A in the others."""
    return only_b(trip) if trip.version % 2 == 0 else only_a(trip)


def changed_halves(trip: Trip) -> int:
    """The halves updated since the last contact; both at first contact."""
    first = trip.since < 0
    has_b = first or any(version % 2 == 1 for version in trip.made)
    has_a = first or any(version % 2 == 0 for version in trip.made)
    return has_b * only_b(trip) + has_a * only_a(trip)


def missed_stacks(trip: Trip) -> int:
    """The increments made since the last contact, or the whole sum where that is smaller."""
    missed = sum(trip.stacks[v - 1] for v in trip.made) * (trip.outs + trip.ins)
    whole = sum(min(sum(trip.stacks) * (o + i), o * i) for o, i in trip.shapes)
    return min(missed, whole)


@dataclass(frozen=True)
class Case:
    """What an algorithm promises."""

    name: str
    up: Elements
    """Closed form of the numbers a client sends."""
    down: Elements
    """Closed form of the numbers a client receives."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False
    """The global view after a round is the base plus sum_k p_k s_k B_k A_k (equal ranks)."""
    personal: bool = False
    """Clients keep tensors that make a view of their own."""
    mixed_rank: MixedRank = "unsupported"
    shares_head: bool = True
    """Whether a head travels under the policy `shared`."""
    uses_svd: bool = False
    """Factors come out of an SVD: fp32 then agrees to 1e-4 only."""
    exempt: frozenset[str] = frozenset()
    """Invariants that the specification does not ask of it: `zero-step mixed`."""

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.settings.items())])


CASES = [
    Case("fedit", up=both, down=both),
    Case("ffa-lora", up=only_b, down=only_b, exact=True, mixed_rank="padded"),
    Case(
        "fedsa-lora",
        up=only_a,
        down=only_a,
        personal=True,
        mixed_rank="padded",
        shares_head=False,
    ),
    Case("rolora", up=alternating, down=changed_halves, exact=True, mixed_rank="padded"),
    Case(
        "flexlora",
        up=both,
        down=both,
        mixed_rank="projected",
        uses_svd=True,
        # a client of small rank gets a truncated adapter, so zero steps still change the mean
        exempt=frozenset({"zero-step mixed"}),
    ),
    Case("flora", up=both, down=missed_stacks, exact=True, mixed_rank="exact"),
]
