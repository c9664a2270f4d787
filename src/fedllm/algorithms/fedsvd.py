"""FedSVD: only B is trained and averaged; the server turns A into an orthonormal basis again.

Paper: Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA",
       NeurIPS 2025, arXiv:2505.12805.
Box:   B' = sum_k p_k B_k;  every `period` rounds  U S V^T = svd(B' A),  B <- U_r S_r,  A <- V_r^T.
Fields: s stands on neither side. A is the random start until the first round is done.
Evidence: official code read (seanie12/fed-svd). The update is exact, since A is common. What the
abstract does not say: with a B' of full rank the rows of V_r^T span those of A, so the subspace of
the random A is never left. A late B is brought to today's A by B A_then A_now^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from fedllm.adapters import algebra, is_a
from fedllm.federation import BaseClient, Job, LateBasisServer, MixedRank, Part


@dataclass(kw_only=True)
class Server(LateBasisServer):
    """Averages B, and refactors the product."""

    mixed_rank: ClassVar[MixedRank] = "projected"
    recoordinated: ClassVar[str] = "its factors come out of an SVD every few rounds"

    period: Annotated[int, Field(ge=1)] = 1
    """Rounds from one refactorisation to the next."""

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Average B; when it is time, refactor B A, which leaves the product as it is."""
        super().aggregate(parts)
        if (self.version + 1) % self.period == 0:
            products = algebra.stack([(1.0, self.adapter.body)])
            factors = algebra.refactor(products, self.adapter.rank, self.adapter.scaling)
            self.adapter = self.adapter.overlaid(factors)


class Client(BaseClient):
    """Trains B and the head."""

    def trainable(self, name: str, job: Job) -> bool:
        """A is frozen."""
        return not is_a(name) and super().trainable(name, job)
