"""Clients that give up a part of their rank for good, and a server that keeps up with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from pydantic import Field

from fedllm.adapters import Adapter, algebra, lateness, pruning
from fedllm.federation.base import NOBODY, BaseServer, weighted
from fedllm.federation.client import BaseClient
from fedllm.federation.messages import ClientId, Job, Part, Payload, Update


@dataclass(kw_only=True)
class PrunedRankServer(BaseServer):
    """Takes a client's rank from what it sent last."""

    gamma: Annotated[float, Field(gt=0, le=1)] = 0.99
    """g: share of the rank before the tail that may be pruned; 1 prunes nothing."""
    smallest_rank: Annotated[int, Field(ge=1)] = 1
    """No client is pruned below it."""
    pruned: dict[ClientId, int] = field(default_factory=dict, init=False)
    """Rank of each client that has taken part."""

    def download(self, cid: ClientId) -> Payload:
        """Cut to what the client's rank has become."""
        rank = self.pruned.get(cid, self.ranks.of(cid))
        return self.payload(cid, algebra.truncate(self.adapter, rank))

    def noted(self, parts: Sequence[Part]) -> list[tuple[float, Adapter]]:
        """Remember the ranks that were sent; return weights and adapters."""
        for _, update in parts:
            if update.cid != NOBODY and update.version == self.version:
                self.pruned = {**self.pruned, update.cid: update.adapter.rank}
        return weighted(parts)

    def rebase(self, update: Update, job: Job) -> Update | None:
        """Remember the rank that was sent; what a late client lacks stays as it is."""
        self.pruned = {**self.pruned, update.cid: update.adapter.rank}
        start, now = job.payload.adapter.tensors, self.adapter.tensors
        return replace(update, adapter=lateness.change_onto(update.adapter, start, now))


class PrunedRankClient(BaseClient):
    """Cuts off the tail of its rank when training has made it smaller."""

    def finish(self, trained: Adapter, job: Job) -> Adapter:
        """Prune, and send what is left."""
        gamma, smallest = job.settings["gamma"], job.settings["smallest_rank"]
        return super().finish(pruning.pruned(trained, self.start(job), gamma, smallest), job)
