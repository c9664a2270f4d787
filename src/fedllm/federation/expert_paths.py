"""An expert for each cluster of clients; all of them, and one router, travel to every client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fedllm.adapters import experts, is_head, is_router, slot_of
from fedllm.federation.base import weighted
from fedllm.federation.client import BaseClient
from fedllm.federation.clusters import ClusteredServer
from fedllm.federation.messages import ClientId, Job, Part, Payload

if TYPE_CHECKING:
    from torch import Tensor

ALONE, GATHER, TOGETHER = "alone", "gather", "together"
"""Stages: clients train alone, send what they have, and train experts together."""


@dataclass(kw_only=True)
class ExpertServer(ClusteredServer):
    """A server whose clients train alone until they are clustered, and experts afterwards."""

    has_mean: ClassVar[bool] = False
    recoordinated: ClassVar[str] = (
        "its experts are founded on the way, and only clients of one cluster train the same one"
    )

    @property
    def rounds_alone(self) -> int:
        """How many rounds pass before clusters are found."""
        return 1

    @property
    def stage(self) -> str:
        """The last round alone ends with everyone sending its adapter."""
        if self.members:
            return TOGETHER
        return ALONE if self.version < self.rounds_alone - 1 else GATHER

    @property
    def is_whole(self) -> bool:
        """Clustering needs everyone."""
        return self.stage != TOGETHER

    def is_known(self, name: str, cid: ClientId) -> bool:
        """Who trains alone starts from the seed and goes on from its own."""
        return self.stage != TOGETHER or super().is_known(name, cid)

    def download(self, cid: ClientId) -> Payload:
        """Return all experts and the router of the client's cluster."""
        if self.stage != TOGETHER:
            return super().download(cid)
        return self.payload(cid, experts.for_cluster(self.adapter, self.cluster_of(cid)))

    def labels(self, parts: Sequence[Part]) -> Sequence[int]:
        """Return the cluster of each part, from 0 on."""
        raise NotImplementedError

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Average within clusters; the first time, find clusters and found their experts."""
        if self.stage == TOGETHER:
            mean = experts.mean_by_cluster(weighted(parts), self.adapter)
            self.adapter = self.adapter.overlaid(mean)
        elif self.stage == GATHER:
            self.average_heads(parts)
            parts = sorted(parts, key=lambda part: part.update.cid)
            labels = self.labels(parts)
            self.adapter = experts.founded(weighted(parts), labels, self.adapter, self.seed)
            self.enrol([part.update.cid for part in parts], labels)

    def view(
        self, cid: ClientId | None = None, state: Mapping[str, Tensor] | None = None
    ) -> Payload:
        """Return a client's experts and router, or the uniform mean of the experts."""
        found = super().view(cid, state)
        if cid is not None or not self.members:
            return found
        return replace(found, adapter=experts.centre(self.adapter))


class ExpertClient(BaseClient):
    """Trains an adapter alone, then its cluster's expert and router."""

    def trainable(self, name: str, job: Job) -> bool:
        """The experts of other clusters are frozen."""
        routing = job.payload.adapter.routing
        is_own = routing is None or is_router(name) or slot_of(name) == routing.slots[-1]
        return (is_own or is_head(name)) and super().trainable(name, job)

    def kept(self, name: str, job: Job) -> bool:
        """What is trained alone is kept until it is sent."""
        is_alone = job.stage == ALONE and self.trainable(name, job)
        return is_alone or super().kept(name, job)
