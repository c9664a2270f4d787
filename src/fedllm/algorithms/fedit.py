"""FedIT: the weighted mean of A and of B (FedAvg on the adapter).

Paper: Zhang et al., "Towards Building the Federated GPT", ICASSP 2024, arXiv:2305.05644.
Box:   A <- sum_k p_k A_k,  B <- sum_k p_k B_k,  p_k = n_k / sum_j n_j over the cohort.
Fields: p_k from `weights`, n_k is `Update.num_samples`.
Evidence: official code read (JayZhang42/FederatedGPT-Shepherd). The product of means is not the
mean of products: W_eff differs from the ideal by -s sum_k p_k (B_k - B)(A_k - A).
"""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.federation import BaseClient, BaseServer


@dataclass(kw_only=True)
class Server(BaseServer):
    """The defaults of the base class are FedIT."""


class Client(BaseClient):
    """Trains A, B and the head, and sends all of them."""
