"""FedMomentum: average the products, send the strongest part as factors, merge the rest.

Paper: Yan et al., "FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning",
       arXiv:2603.08014.
Box:   M = sum_k p_k s_k B_k A_k / s,  U S V^T = svd(M);  B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T;
       W <- W + s sum over r < j <= r_eff of U_j S_j V_j^T; beyond that everything is discarded.
Fields: r_eff is the smallest rank that holds `energy` (tau) of the squared singular values.
Evidence: abstract, reviews and a summary; no code found. Reviews say "about 99 % of the energy";
how often the residual is merged was not seen: every round here. W_eff = ideal - s (discarded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from fedllm.adapters import algebra, factoring
from fedllm.federation import BaseClient, BaseServer, MixedRank, Part, weighted


@dataclass(kw_only=True)
class Server(BaseServer):
    """Splits the average product into factors and a residual."""

    mixed_rank: ClassVar[MixedRank] = "projected"
    recoordinated: ClassVar[str] = "its factors come out of an SVD every round"
    late = "products"

    energy: Annotated[float, Field(gt=0, le=1)] = 0.99
    """tau: share of the squared singular values that factors and residual keep together."""

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Send what fits into the rank, merge what is left; average heads."""
        products = algebra.mean_products([(w, a.body) for w, a in weighted(parts)])
        rank, scaling = self.ranks.largest, self.adapter.scaling
        factors, residual = factoring.balanced_split(products, rank, scaling, self.energy)
        self.adapter = self.adapter.overlaid(factors)
        self.merge(residual)
        self.average_heads(parts)


class Client(BaseClient):
    """Trains A, B and the head, and sends all of them."""
