"""Which LoRA rank a client has: a function of (seed, client) that no population is listed for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.config import BudgetRange, RankMemory, RankPolicy, RankTiers, ranks_in
from fedllm.errors import ConfigError
from fedllm.seeding import derive, rng

_ROUNDS = 4
"""Of the Feistel network, both halves in each: a large one needs half of them to look random."""
_TRAINED_BYTES = 16
"""fp32 parameter, gradient and two moments of AdamW."""
_MB = 1e6


@dataclass(frozen=True)
class RankRule:
    """One rank for all, or one of several drawn from (seed, client), each as likely."""

    choices: tuple[int, ...]
    """The ranks there are."""
    seed: int = 0

    @property
    def largest(self) -> int:
        """The rank of the server's adapter."""
        return max(self.choices)

    @functools.cached_property
    def is_mixed(self) -> bool:
        """Whether clients may differ."""
        return len(set(self.choices)) > 1

    def of(self, cid: int) -> int:
        """Return the rank of a client."""
        if not self.is_mixed:
            return self.choices[0]
        return int(rng(self.seed, "rank", cid).choice(self.choices))


@dataclass(frozen=True, kw_only=True)
class WeightedRule(RankRule):
    """One of several ranks drawn from (seed, client) by weight."""

    weights: tuple[float, ...]
    """How likely each choice is; they need not sum to 1."""

    def of(self, cid: int) -> int:
        """Return the rank of a client."""
        chances = np.array(self.weights) / max(self.weights)
        stream = rng(self.seed, "rank", cid)
        return int(stream.choice(self.choices, p=chances / chances.sum()))


@dataclass(frozen=True, kw_only=True)
class TierRule(RankRule):
    """An exact number of clients of each rank, who is who drawn from the seed.

    A client's place in the order of tiers comes from a keyed bijection of the population onto
    itself, a Feistel network: nothing is stored, and a client costs a few hashes.
    """

    counts: tuple[int, ...]
    """How many clients have each choice; their sum is the population."""

    def of(self, cid: int) -> int:
        """Return the rank of a client."""
        tier = np.searchsorted(np.cumsum(self.counts), self._place(cid), side="right")
        return self.choices[int(tier)]

    def _place(self, cid: int) -> int:
        """Return where a client stands: a permutation of 0, ..., population - 1."""
        population = sum(self.counts)
        assert 0 <= cid < population
        # nearly square, so that few numbers of the grid are no client's
        rows = math.isqrt(population - 1) + 1
        columns = -(-population // rows)
        place = cid
        while True:  # walks along a cycle of the grid's permutation, back into the population
            row, column = divmod(place, columns)
            for step in range(_ROUNDS):
                row = (row + derive(self.seed, "tier row", step, column)) % rows
                column = (column + derive(self.seed, "tier column", step, row)) % columns
            place = row * columns + column
            if place < population:
                return place


@dataclass(frozen=True, kw_only=True)
class MemoryRule(RankRule):
    """The largest choice whose training fits a client's memory.

    Raises:
        ConfigError: If there can be a client whom not even the smallest choice fits.
    """

    budget_mb: float | Sequence[float] | BudgetRange
    """Memory in millions of bytes; of several, each client's is drawn from (seed, client)."""
    rank_parameters: int
    """Parameters of an adapter of rank 1: sum of (out + in) over the adapted layers."""
    head_parameters: int = 0
    """Parameters that are trained in full, whatever the rank."""

    def __post_init__(self) -> None:
        """Refuse budgets that leave a client without any rank."""
        smallest = min(self.choices)
        needed = self.needed_mb(smallest)
        if (share := _share_below(self.budget_mb, needed)) > 0:
            head = ", head included" if self.head_parameters else ""
            raise ConfigError(
                [
                    f"adapter.rank.budget_mb: {share:.1%} of the clients have less than the"
                    f" {needed:.15g} MB that rank {smallest} takes on this model{head}. Let the"
                    f" smallest budget be {needed:.15g} or more, or add a smaller choice"
                ]
            )

    def needed_mb(self, rank: int) -> float:
        """Return what training an adapter of this rank takes, in millions of bytes."""
        return _TRAINED_BYTES * (rank * self.rank_parameters + self.head_parameters) / _MB

    def of(self, cid: int) -> int:
        """Return the rank of a client."""
        budget = self.budget_of(cid)
        return max(rank for rank in self.choices if self.needed_mb(rank) <= budget)

    def budget_of(self, cid: int) -> float:
        """Return the memory of a client, in millions of bytes."""
        budget = self.budget_mb
        if isinstance(budget, BudgetRange):
            way = rng(self.seed, "rank budget", cid).random()
            return float(budget.low * (budget.high / budget.low) ** way)
        if isinstance(budget, Sequence):
            return float(rng(self.seed, "rank budget", cid).choice(budget))
        return budget


@dataclass(frozen=True, kw_only=True)
class DeviceRule(RankRule):
    """The largest choice whose training fits what a client's device has left for it.

    Whose device is too small for every choice has the smallest: it is found before the run.
    """

    left_bytes: Callable[[int], float]
    """Client to the bytes that its device has beside weights and activations."""
    rank_parameters: int
    head_parameters: int = 0

    def of(self, cid: int) -> int:
        """Return the rank of a client."""
        left = self.left_bytes(cid) / _TRAINED_BYTES - self.head_parameters
        fitting = [rank for rank in self.choices if rank * self.rank_parameters <= left]
        return max(fitting, default=min(self.choices))


def rank_rule(
    rank: int | list[int] | RankPolicy,
    seed: int,
    *,
    num_clients: int,
    rank_parameters: int,
    head_parameters: int = 0,
    left_bytes: Callable[[int], float] | None = None,
) -> RankRule:
    """Return the rule that `adapter.rank` asks for.

    Args:
        rank: As in the configuration.
        seed: Root of the draws.
        num_clients: Size of the population.
        rank_parameters: Parameters of an adapter of rank 1.
        head_parameters: Parameters that are trained in full, whatever the rank.
        left_bytes: Client to the memory that its device has left for the adapter.

    Raises:
        ConfigError: If there can be a client whom not even the smallest rank fits.
    """
    choices = ranks_in(rank)
    if isinstance(rank, (int, list)):
        return RankRule(choices, seed)
    if isinstance(rank, RankTiers):
        counts = apportion([tier.share for tier in rank.tiers], num_clients)
        return TierRule(choices, seed, counts=counts)
    if isinstance(rank, RankMemory):
        sizes = {"rank_parameters": rank_parameters, "head_parameters": head_parameters}
        if rank.budget_mb != "device":
            return MemoryRule(choices, seed, budget_mb=rank.budget_mb, **sizes)
        if left_bytes is None:
            raise ConfigError(
                ["adapter.rank.budget_mb: `device` needs devices; set mode: realistic and system"]
            )
        return DeviceRule(choices, seed, left_bytes=left_bytes, **sizes)
    return WeightedRule(choices, seed, weights=tuple(rank.weights))


def apportion(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """Divide a whole number by shares, by the method of the largest remainder.

    >>> apportion([0.2, 0.8], 8)
    (2, 6)
    """
    exact = [share / math.fsum(shares) * total for share in shares]
    counts = [math.floor(part) for part in exact]
    # equal remainders go to the earlier share, whatever a last digit says
    order = sorted(range(len(shares)), key=lambda i: round(counts[i] - exact[i], 9))
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return tuple(counts)


def _share_below(budget: float | Sequence[float] | BudgetRange, needed: float) -> float:
    """Return which part of the clients has less than what is needed, in expectation."""
    if isinstance(budget, BudgetRange):
        if needed <= budget.low or needed > budget.high:
            return float(needed > budget.low)
        return math.log(needed / budget.low) / math.log(budget.high / budget.low)
    budgets = budget if isinstance(budget, Sequence) else [budget]
    return sum(item < needed for item in budgets) / len(budgets)
