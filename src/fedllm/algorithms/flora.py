"""FLoRA: stack the clients' adapters and merge the stack into the base; start anew each round.

Paper: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
       Low-Rank Adaptations", NeurIPS 2024, arXiv:2409.05976.
Box:   B = [B_1 ... B_K], A = [p_1 s_1 A_1; ...; p_K s_K A_K];  W <- W + B A  (exact, any ranks).
Fields: the stack goes to `merge`; W is never written to, see `BaseDelta`.
Evidence: official code read (ATP-1010/FederatedLLM), where each client draws a fresh A in every
round; the stack there is sized for full participation, here for the cohort.
The global view is the base with its increments: the adapter itself has B = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedllm.adapters import Adapter, algebra, fresh, is_head
from fedllm.federation import BaseClient, ClientId, FreshStartServer, Job, MixedRank, Part, weighted


@dataclass(kw_only=True)
class Server(FreshStartServer):
    """Merges the stack of all updates."""

    mixed_rank: ClassVar[MixedRank] = "exact"
    recoordinated: ClassVar[str] = "its adapters are merged into the base every round"

    def is_known(self, name: str, cid: ClientId) -> bool:
        """A client draws its own factors; only heads and increments travel."""
        return not is_head(name) or super().is_known(name, cid)

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Merge the stacked products into the base; average heads."""
        self.merge(algebra.mean_products(weighted(parts)))
        self.average_heads(parts)


class Client(BaseClient):
    """Trains a fresh adapter on the base as it now is."""

    def start(self, job: Job) -> Adapter:
        """Draw A from the job's seed, with B = 0."""
        return fresh(super().start(job), job.seed)
