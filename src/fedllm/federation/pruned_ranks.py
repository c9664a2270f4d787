"""Clients that give up a part of their rank for good, and a server that keeps up with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from fedllm.adapters import Adapter, algebra, pruning
from fedllm.federation.base import BaseClient, BaseServer, weighted
from fedllm.federation.messages import ClientId, Job, Part, Payload


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
        self.pruned = {**self.pruned, **{update.cid: update.adapter.rank for _, update in parts}}
        return weighted(parts)


class PrunedRankClient(BaseClient):
    """Cuts off the tail of its rank when training has made it smaller."""

    def finish(self, trained: Adapter, job: Job) -> Adapter:
        """Prune, and send what is left."""
        gamma, smallest = job.settings["gamma"], job.settings["smallest_rank"]
        return super().finish(pruning.pruned(trained, self.start(job), gamma, smallest), job)
