"""FedEx-LoRA: average the factors, and merge what the average misses into the base.

Paper: Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
       Large Language Models", ACL 2025, arXiv:2410.09432.
Box:   A <- sum_k p_k A_k,  B <- sum_k p_k B_k,  W <- W + s (sum_k p_k B_k A_k - B A)  (exact).
Fields: the residual is s sum_k p_k (B_k - B)(A_k - A), of rank (K - 1) r at most; `residual_rank`
       keeps only its largest components.
Evidence: official code read (RaghavSinghal10/fedex-lora, whose means are uniform), and fed-svd's.
The release adds the transposed residual to every layer, which is right for GPT-2's Conv1D alone.
With unequal ranks the stored pair is the padded mean and the residual the stack against it: exact
too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from fedllm.adapters import factoring, is_on_path
from fedllm.federation import BaseClient, BaseServer, MixedRank, Part, weighted


@dataclass(kw_only=True)
class Server(BaseServer):
    """Averages factors and merges the residual."""

    mixed_rank: ClassVar[MixedRank] = "padded"
    recoordinated: ClassVar[str] = "every round moves a part of the update into the base"

    residual_rank: Annotated[int, Field(ge=1)] | None = None
    """Rank to which the residual is truncated; None keeps all of it."""

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Average as FedIT does, then merge what is missing."""
        super().aggregate(parts)
        sent = [(w, a.select(is_on_path)) for w, a in weighted(parts)]
        self.merge(factoring.residual(sent, self.adapter, self.residual_rank))


class Client(BaseClient):
    """Trains A, B and the head, and sends all of them."""
