"""Schedules without rounds: clients work all the time, and the server takes what arrives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedllm.federation import BaseServer, Update
from fedllm.simulation.schedules import Order, Schedule, shares


@dataclass
class Stream(Schedule):
    """As many clients as are wanted work at any time; whoever is done is replaced at once."""

    is_stream: ClassVar[bool] = True

    cohort_size: int = 1
    """Clients at work."""
    staleness: Literal["constant", "polynomial", "hinge"] = "polynomial"
    a: float = 0.5
    b: int = 4
    latest: int | None = None

    @property
    def max_staleness(self) -> int | None:
        """As set."""
        return self.latest

    def stream_name(self, group: int, version: int, dispatched: int) -> tuple[str | int, ...]:
        """Clients are drawn one by one, many within a version."""
        return ("dispatch", dispatched)

    def orders(self, busy: int) -> list[Order]:
        """Replace who is no longer at work."""
        return [Order(0, self.cohort_size - busy)] if busy < self.cohort_size else []

    def discount(self, lateness: int) -> float:
        """Return s(d): how much an update counts that is so many versions late (1 if it is not).

        Paper: Xie et al., 1903.03934, section 5.2; FedBuff's 1 / sqrt(1 + d) is the polynomial with
        a = 0.5.
        """
        if self.staleness == "polynomial":
            return float((1.0 + lateness) ** -self.a)
        if self.staleness == "hinge" and lateness > self.b:
            return 1.0 / (self.a * (lateness - self.b) + 1.0)
        return 1.0


@dataclass
class Buffered(Stream):
    """FedBuff: x <- x + eta_g sum_k p_k s(d_k) (x_k - x_then), for every `size` arrivals.

    Paper: Nguyen et al., 2106.06639, algorithm 1, where p_k = 1 / K. Clients of unequal weight get
    p_k from the server's weights.
    """

    takes_changes: ClassVar[bool] = True

    size: int = 10
    server_learning_rate: float = 1.0
    wait_s: float | None = None

    def room(self, group: int, rounds_left: int) -> int | None:
        """Return what fills the buffers that are left."""
        return rounds_left * self.size - len(self.groups[group].arrived)

    @property
    def deadline_s(self) -> float | None:
        """As set."""
        return self.wait_s

    def is_ready(self, group: int) -> bool:
        """Tell whether the buffer is full, or its time is up and it is not empty."""
        own = self.groups[group]
        return len(own.arrived) >= self.size or (own.is_due and bool(own.arrived))

    def weights(self, group: int, server: BaseServer, updates: Sequence[Update]) -> list[float]:
        """Discount what is late; what is lost by that is today's model's."""
        eta, now = self.server_learning_rate, server.version
        return [
            eta * share * self.discount(now - update.version)
            for share, update in zip(shares(server, updates), updates, strict=True)
        ]


@dataclass
class Async(Stream):
    """FedAsync: x <- (1 - w) x + w x_k with w = alpha s(d), for every arrival.

    Paper: Xie et al., "Asynchronous Federated Optimization", 1903.03934, algorithm 1. An update
    that no other came before has d = 0.
    """

    alpha: float = 0.6

    def room(self, group: int, rounds_left: int) -> int | None:
        """Return one for each version that is left."""
        return rounds_left

    def is_ready(self, group: int) -> bool:
        """Tell whether one has arrived."""
        return bool(self.groups[group].arrived)

    def weights(self, group: int, server: BaseServer, updates: Sequence[Update]) -> list[float]:
        """Return alpha s(d); how many rows a client has plays no part."""
        return [self.alpha * self.discount(server.version - u.version) for u in updates]
