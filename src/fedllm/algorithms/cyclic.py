"""Cyclic transfer: the model goes from client to client, one after the other.

Paper: Chang et al., "Distributed deep learning networks among institutions for medical imaging",
       JAMIA 2018.
Box:   hop j: client pi_j receives x, trains, and returns x_new;  x <- x_new.
Fields: pi is one random order for the whole run, or with `reshuffle` a new one for each cycle.
Evidence: from memory; it is FedIT with a cohort of one, so a hop averages nothing. One version is
one hop, and a cycle as many hops as there are clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fedllm.federation import BaseClient, BaseServer, ClientId

if TYPE_CHECKING:
    import numpy as np


@dataclass(kw_only=True)
class Server(BaseServer):
    """Walks through the clients."""

    is_random_cohort: ClassVar[bool] = False
    refused_schedules: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("buffered", "async", "semi-sync"), "it passes one model from client to client"
    )

    reshuffle: bool = False
    """Draw a new order for each cycle."""
    order: list[ClientId] = field(default_factory=list, init=False)
    """The order of this cycle."""
    hops: int = field(default=0, init=False)
    """How many hops of it are done."""

    def sample(
        self, pool: Sequence[ClientId], count: int, rng: np.random.Generator
    ) -> Sequence[ClientId]:
        """Choose the next client of the order."""
        if self.hops % max(len(pool), 1) == 0 and (self.reshuffle or not self.order):
            self.order = [pool[int(i)] for i in rng.permutation(len(pool))]
        self.hops += 1
        return [self.order[(self.hops - 1) % len(self.order)]]


class Client(BaseClient):
    """Trains A, B and the head, and sends all of them."""
