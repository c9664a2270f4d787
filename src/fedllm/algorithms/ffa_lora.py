"""FFA-LoRA: A is frozen at its common random start; only B is trained and averaged.

Paper: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
       arXiv:2403.12313.
Box:   B <- sum_k p_k B_k, exact because sum_k p_k s B_k A0 = s (sum_k p_k B_k) A0.
Fields: A0 follows from the run's seed, so it never travels.
Evidence: abstract and reviews read, formulas from others' implementations; no official code found.
Clients of smaller rank own the leading rows of A0; a column of B is averaged over its owners.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedllm.adapters import is_a
from fedllm.federation import BaseClient, BaseServer, ClientId, Job, MixedRank


@dataclass(kw_only=True)
class Server(BaseServer):
    """Averages B and sends it; every client draws A0 from the seed."""

    mixed_rank: ClassVar[MixedRank] = "padded"

    def is_known(self, name: str, cid: ClientId) -> bool:
        """A0 is known to all from the seed."""
        return is_a(name) or super().is_known(name, cid)


class Client(BaseClient):
    """Trains B and the head."""

    def trainable(self, name: str, job: Job) -> bool:
        """A is frozen."""
        return not is_a(name) and super().trainable(name, job)
