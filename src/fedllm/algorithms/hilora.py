"""HiLoRA: three adapters in cascade, for all clients, for a cluster of them, and for one.

Paper: Peng et al., "HiLoRA", CVPR 2026, arXiv:2603.02785.
Box:   W + s (B_r A_r + B_c A_c + B_l A_l), trained one after the other, earlier ones frozen.
       Root and cluster: svd(sum_k p_k s_k B_k A_k) gives B = U, A = S V^T / s.  Clusters: U_k from
       B'_k <- e B'_k + (1 - e) B_k / ||B_k|| of root rounds, d = 1 - ||U_k^T U_l||^2 / r, spectral.
       Penalties: g_c ||B_r^T B_c||^2;  then g_c ||B_r^T B_l||^2 + g_l ||B_c^T B_l||^2.
Fields: e is `decay`, g_c `root_penalty`, g_l `cluster_penalty`; rounds left over train leaves.
Evidence: abstract and two summaries; no code. Lengths, e, g and K are an unofficial version's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from fedllm.adapters import Adapter, algebra, clustering, factoring, penalties
from fedllm.federation import CLUSTER, ROOT, Job, MixedRank, TieredClient, TieredServer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Server(TieredServer):
    """Averages products, and clusters clients by the column spaces of their B."""

    mixed_rank: ClassVar[MixedRank] = "projected"
    recoordinated: ClassVar[str] = "its factors come out of an SVD every round"
    root_penalty: Annotated[float, Field(ge=0)] = 0.1
    """g_c: how strongly later tiers are kept orthogonal to the root."""
    cluster_penalty: Annotated[float, Field(ge=0)] = 0.1
    """g_l: how strongly a leaf is kept orthogonal to the cluster's tier."""

    def combined(self, parts: Sequence[tuple[float, Adapter]]) -> dict[str, Tensor]:
        """Split the average product."""
        products, scaling = algebra.mean_products(parts), self.adapter.scaling
        return factoring.orthonormal_split(products, self.ranks.largest, scaling)

    def labels(self, directions: Sequence[Adapter]) -> Sequence[int]:
        """Cluster clients by how much of the space of their B'_k they share."""
        distances = clustering.subspace_distances(directions, self.ranks.largest)
        return clustering.spectral(distances, self.min_clusters, self.max_clusters, self.seed)


class Client(TieredClient):
    """Trains a tier whose B is kept orthogonal to those of earlier ones."""

    def penalty(self, live: Mapping[str, Tensor], job: Job) -> Tensor | None:
        """Weigh the overlap with each earlier tier."""
        settings = job.settings
        weights = {ROOT: settings["root_penalty"], CLUSTER: settings["cluster_penalty"]}
        return penalties.overlap(live, job.payload.adapter.tensors, weights)
