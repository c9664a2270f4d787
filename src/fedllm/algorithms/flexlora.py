"""FlexLoRA: average the products, then factor the average anew for each client's rank.

Paper: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
       Client Resources", NeurIPS 2024, arXiv:2402.11505.
Box:   dW = sum_k p_k s_k B_k A_k;  U S V^T = svd(dW);  client of rank q gets
       B = U_q S_q / s_q, A = V_q^T, so that s_q B A is the best rank-q approximation of dW.
Fields: s_k is `Adapter.scaling`. dW is never formed: the SVD works on the stacked factors.
Evidence: official code read (alibaba/FederatedScope, branch FlexLoRA), whose split of S is kept.
The global adapter is the rank-r_max split; a client's is its leading rows and columns, the same
as factoring for that rank. What lies beyond r_max is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedllm.adapters import algebra
from fedllm.federation import BaseClient, BaseServer, MixedRank, Part, weighted


@dataclass(kw_only=True)
class Server(BaseServer):
    """Aggregates in product space."""

    mixed_rank: ClassVar[MixedRank] = "projected"
    recoordinated: ClassVar[str] = "its factors are refactored by SVD every round"
    late = "products"

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Factor the weighted sum of products at the largest rank; average heads."""
        products = algebra.mean_products(weighted(parts))
        factors = algebra.refactor(products, self.ranks.largest, self.adapter.scaling)
        self.adapter = self.adapter.overlaid(factors)
        self.average_heads(parts)


class Client(BaseClient):
    """Trains A, B and the head, and sends all of them."""
