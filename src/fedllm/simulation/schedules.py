"""When the server aggregates, and with which weights; how is the algorithm's business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedllm.federation import BaseServer, ClientId, Part, Update


@dataclass
class Sync:
    """Wait for the whole cohort; the weights of its updates sum to 1.

    The current global state enters an aggregation with the weight that is left over, which here
    is none.
    """

    cohort: list[ClientId] = field(default_factory=list)
    """Clients of this round, in the order of sampling."""
    arrived: list[Update] = field(default_factory=list)
    rejected: int = 0
    """How many updates of this round were rejected."""

    def begin(self, cohort: Sequence[ClientId]) -> None:
        """Start a round."""
        self.cohort, self.arrived, self.rejected = list(cohort), [], 0

    def receive(self, update: Update) -> None:
        """Take an update that has arrived."""
        self.arrived.append(update)

    def reject(self) -> None:
        """Stop waiting for one update: it came, and is not to be aggregated."""
        self.rejected += 1

    @property
    def is_ready(self) -> bool:
        """Whether the server can aggregate."""
        return bool(self.cohort) and len(self.arrived) + self.rejected == len(self.cohort)

    def parts(self, server: BaseServer) -> list[Part]:
        """Return the updates with their weights, in an order that no arrival time changes."""
        updates = sorted(self.arrived, key=lambda update: update.cid)
        weights = [server.weight(update) for update in updates]
        total = sum(weights) or 1.0
        return [Part(w / total, update) for w, update in zip(weights, updates, strict=True)]
