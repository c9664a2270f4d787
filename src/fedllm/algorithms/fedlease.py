"""FedLEASE: clients are clustered by what they learn alone; each cluster trains one of M experts.

Paper: Wang, Bian et al., "Adaptive LoRA Experts Allocation and Selection for Federated
       Fine-Tuning", NeurIPS 2025, arXiv:2509.15087.
Box:   adapters are trained alone;  d(k, l) = mean over layers of 1 - cos(B_k, B_l) gives M clusters
       by silhouette;  expert c = mean of its cluster.  Then y = W x + s sum_slots g B_e A_e x, g
       the M largest of softmax(R x), made to sum to 1: a client's own expert has M of the 2M - 1
       slots, each other one 1.  It trains its expert and R, which are averaged in its cluster.
Fields: M is at most `max_clusters`, or `clusters`; slots and R are made in `adapters.experts`.
Evidence: authors' code read (its means are uniform, hence `weights`); a shared head is everyone's.
Who missed the warm-up joins the largest cluster. The global view is the experts' uniform mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fedllm.adapters import clustering
from fedllm.federation import ExpertClient, ExpertServer, Part, weighted


@dataclass(kw_only=True)
class Server(ExpertServer):
    """Clusters clients by the directions of their B, and averages experts within clusters."""

    weights: Literal["samples", "uniform"] = "uniform"
    """Weigh the clients of a cluster by their number of training rows, or all alike."""
    warmup_rounds: Annotated[int, Field(ge=1)] = 5
    """Rounds in which clients train alone; everyone sends its adapter at the end of the last."""
    max_clusters: Annotated[int, Field(ge=2)] = 4
    """Most clusters that are tried."""
    clusters: Annotated[int, Field(ge=1)] | None = None
    """Number of clusters, if it is not to be found."""

    @property
    def rounds_alone(self) -> int:
        """The warm-up."""
        return self.warmup_rounds

    def labels(self, parts: Sequence[Part]) -> Sequence[int]:
        """Link clients by average distance."""
        distances = clustering.cosine_distances([sent for _, sent in weighted(parts)])
        if self.clusters is not None:
            return clustering.agglomerate_into(distances, self.clusters)
        return clustering.agglomerate(distances, self.max_clusters)


class Client(ExpertClient):
    """Trains alone, then its cluster's expert and router."""
