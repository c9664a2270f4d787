"""Servers that find out which clients are alike, and treat each cluster by itself from then on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fedllm.federation.base import together_only
from fedllm.federation.messages import ClientId
from fedllm.federation.stages import StagedServer


@dataclass(kw_only=True)
class ClusteredServer(StagedServer):
    """A server that knows each client's cluster, once there are any."""

    is_personal: ClassVar[bool] = True
    refused_schedules: ClassVar[Mapping[str, str]] = together_only(
        "its clusters are found from everyone's updates of one round"
    )

    members: dict[ClientId, int] = field(default_factory=dict, init=False)
    """Client to its cluster; empty until clusters are found."""

    def enrol(self, cids: Iterable[ClientId], labels: Sequence[int]) -> None:
        """Take note of clusters; their numbers are those of `labels`."""
        self.members = dict(zip(cids, labels, strict=True))

    def cluster_of(self, cid: ClientId) -> int:
        """Return a client's cluster: the largest one if it was not there when they were found."""
        if cid in self.members:
            return self.members[cid]
        sizes = Counter(self.members.values())
        return min(sizes, key=lambda cluster: (-sizes[cluster], cluster))
