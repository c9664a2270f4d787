"""Three adapters in cascade: the root of all clients, one for each cluster, a leaf for each client.

The server holds the root, every cluster's tier in a slot of its own (`cluster0`, ...), and the
first leaf; a client gets its own cluster's as `cluster`. A tier starts with B = 0, so that starting
it changes nothing, and is frozen when the next one starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedllm.adapters import Adapter, algebra, clustering, fresh, in_slot, is_head, slot_of
from fedllm.federation.base import weighted
from fedllm.federation.client import BaseClient
from fedllm.federation.clusters import ClusteredServer
from fedllm.federation.messages import ClientId, Job, Part, Payload

if TYPE_CHECKING:
    from torch import Tensor

ROOT, CLUSTER, LEAF = "root", "cluster", "leaf"
"""Slots of the tiers, and the stages that train them."""


@dataclass(kw_only=True)
class TieredServer(ClusteredServer):
    """A server that trains one tier after the other; a subclass finds the clusters."""

    root_rounds: Annotated[int, Field(ge=1)] | None = None
    """Rounds that train the root; None is three tenths of the run."""
    cluster_rounds: Annotated[int, Field(ge=0)] | None = None
    """Rounds that train the clusters' tiers; None is four tenths. The rest trains leaves."""
    min_clusters: Annotated[int, Field(ge=1)] = 2
    """Fewest clusters that are tried."""
    max_clusters: Annotated[int, Field(ge=1)] = 10
    """Most clusters that are tried."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Weight of the past in the mean direction of a client's B."""
    directions: dict[ClientId, Adapter] = field(default_factory=dict, init=False)
    """Where each client's B pointed in the root's rounds, until clusters are found."""

    @property
    def ends(self) -> tuple[int, int]:
        """Versions at which the root and the clusters' tiers are done."""
        root = max(1, round(0.3 * self.rounds)) if self.root_rounds is None else self.root_rounds
        asked = self.cluster_rounds
        return root, root + (round(0.4 * self.rounds) if asked is None else asked)

    @property
    def stage(self) -> str:
        """The tier that is trained; a root without clusters goes on."""
        root, cluster = self.ends
        if self.version < root or not self.members:
            return ROOT
        return CLUSTER if self.version < cluster else LEAF

    @property
    def is_whole(self) -> bool:
        """Everyone trains the root's last round, so that everyone is clustered."""
        return self.stage == ROOT and self.version >= self.ends[0] - 1

    def prepare(self) -> None:
        """Make the common start the root, and put the first leaf beside it."""
        plain, heads = self.adapter.body, self.adapter.select(is_head)
        tiers = plain.moved(ROOT).joined(fresh(plain.moved(LEAF), self.seed))
        self.adapter = tiers.overlaid(heads.tensors)

    def combined(self, parts: Sequence[tuple[float, Adapter]]) -> dict[str, Tensor]:
        """Return new factors of the tiers that were sent."""
        return algebra.mean(parts, self.adapter)

    def labels(self, directions: Sequence[Adapter]) -> Sequence[int]:
        """Return the clusters, from 0 on, of clients whose B point there."""
        raise NotImplementedError

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Combine tiers and average heads; start the clusters' tiers at the root's end."""
        stage = self.stage
        self.adapter = self.adapter.overlaid(self.combined(self.placed(parts)))
        self.average_heads(parts)
        if stage != ROOT:
            return
        for _, sent in parts:
            before = self.directions.get(sent.cid)
            self.directions[sent.cid] = clustering.smoothed(before, sent.adapter, self.decay)
        if self.version + 1 >= self.ends[0]:
            self._divide()

    def _divide(self) -> None:
        cids = sorted(self.directions)
        labels = self.labels([self.directions.pop(cid) for cid in cids])
        self.enrol(cids, labels)
        first = fresh(self.adapter.moved(CLUSTER, of=ROOT), self.seed)
        for cluster in range(max(labels) + 1):
            self.adapter = self.adapter.joined(first.moved(_slot(cluster), of=CLUSTER))

    def download(self, cid: ClientId) -> Payload:
        """Return the tiers up to the one that is trained, and the heads."""
        tiers = self.adapter.moved(ROOT, of=ROOT)
        if self.stage != ROOT:
            own = _slot(self.cluster_of(cid))
            tiers = tiers.joined(self.adapter.moved(CLUSTER, of=own))
        if self.stage == LEAF:
            tiers = tiers.joined(self.adapter.moved(LEAF, of=LEAF))
        whole = tiers.overlaid(self.adapter.select(is_head).tensors)
        rank = self.ranks.of(cid)
        return self.payload(cid, algebra.truncate(whole, rank) if rank < whole.rank else whole)

    def is_known(self, name: str, cid: ClientId) -> bool:
        """A tier that is done travels once, a leaf never."""
        tier = slot_of(name)
        if tier == LEAF:
            return True
        done = {ROOT: (CLUSTER, LEAF), CLUSTER: (LEAF,), "": (LEAF,)}[tier]
        held = in_slot(name, _slot(self.cluster_of(cid))) if tier == CLUSTER else name
        return (self.stage in done and self.is_unchanged(held, cid)) or super().is_known(name, cid)

    def placed(self, parts: Sequence[Part]) -> list[tuple[float, Adapter]]:
        """Return weights and adapters of the parts, tiers named as the server names them."""
        found = []
        for (weight, sent), part in zip(weighted(parts), parts, strict=True):
            own = _slot(self.cluster_of(part.update.cid)) if self.stage == CLUSTER else ROOT
            tier = sent.moved(own, of=self.stage)
            found.append((weight, tier.overlaid(sent.select(is_head).tensors)))
        return found

    def view(
        self, cid: ClientId | None = None, state: Mapping[str, Tensor] | None = None
    ) -> Payload:
        """Return a client's tiers, or the root as a plain adapter."""
        found = super().view(cid, state)
        if cid is not None:
            return found
        root = self.adapter.moved("", of=ROOT)
        heads = self.adapter.select(is_head).tensors
        return replace(found, adapter=root.overlaid(heads))


class TieredClient(BaseClient):
    """Trains the tier that the stage names, and keeps its leaf."""

    def trainable(self, name: str, job: Job) -> bool:
        """The other tiers are frozen; so is a shared head while nothing is sent."""
        if is_head(name):
            return super().trainable(name, job) and (job.stage != LEAF or self.kept(name, job))
        return slot_of(name) == job.stage

    def kept(self, name: str, job: Job) -> bool:
        """A leaf never leaves its client."""
        return slot_of(name) == LEAF or super().kept(name, job)


def _slot(cluster: int) -> str:
    return f"{CLUSTER}{cluster}"
