"""FedSA-LoRA: A is shared and averaged, B (and the head) stays with each client.

Paper: Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
       ICLR 2025, arXiv:2410.01463.
Box:   clients train A and their own B_k;  A <- sum_k p_k A_k;  the model of client k is (A, B_k).
Fields: B_k lives in the client's private state, and is 0 at first contact.
Evidence: official code read (Pengxin-Guo/FedSA-LoRA). The head is local there, and here.
The global view has B = 0: what an unseen client starts from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedllm.adapters import is_a
from fedllm.federation import BaseClient, BaseServer, ClientId, Job, MixedRank


@dataclass(kw_only=True)
class Server(BaseServer):
    """Averages A and sends it."""

    mixed_rank: ClassVar[MixedRank] = "padded"
    is_personal: ClassVar[bool] = True

    def is_known(self, name: str, cid: ClientId) -> bool:
        """Only A travels; B and head are the client's own."""
        return not is_a(name)


class Client(BaseClient):
    """Trains both factors and keeps B and the head."""

    def kept(self, name: str, job: Job) -> bool:
        """B and the head never leave the client."""
        return not is_a(name)
