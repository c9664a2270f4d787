"""SLoRA: first a few entries of every weight are trained, then a LoRA that continues from there.

Paper: Babakniya et al., "SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models",
       FL@FM-NeurIPS 2023, arXiv:2308.06522.
Box:   stage 1, `sparse_rounds` rounds: masked entries of W are trained and averaged, giving dW;
       then U S V^T = svd(dW), B = U_r S_r / s, A = V_r^T, W is W_0 again, and FedIT goes on.
Fields: the mask, a share `density` of each weight, follows from the run's seed and never travels.
Evidence: abstract; the switch is FederatedScope's. With no sparse rounds it is FedIT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from fedllm.adapters import is_index, sparse
from fedllm.federation import BaseClient, ClientId, Job, MixedRank, Part, StagedServer


@dataclass(kw_only=True)
class Server(StagedServer):
    """Averages sparse changes, then a LoRA made of them."""

    mixed_rank: ClassVar[MixedRank] = "projected"
    recoordinated: ClassVar[str] = "what is trained changes its form on the way"
    density: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of each weight's entries that stage 1 trains."""
    sparse_rounds: Annotated[int, Field(ge=0)] = 5
    """Rounds of stage 1."""

    @property
    def stage(self) -> str:
        """Sparse at first."""
        return "sparse" if self.version < self.sparse_rounds else ""

    def prepare(self) -> None:
        """Put a sparse change in the place of LoRA."""
        if self.stage:
            self.adapter = sparse.sparse_start(self.adapter, self.density, self.seed)

    def is_known(self, name: str, cid: ClientId) -> bool:
        """Where the entries lie, all know."""
        return is_index(name) or super().is_known(name, cid)

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Average; at the end of stage 1 continue the change as LoRA."""
        super().aggregate(parts)
        if self.stage and self.version + 1 == self.sparse_rounds:
            self.adapter = sparse.continued(self.adapter, self.ranks.largest)


class Client(BaseClient):
    """Trains the values of the sparse change, or A and B."""

    def trainable(self, name: str, job: Job) -> bool:
        """Places are no numbers to train."""
        return not is_index(name) and super().trainable(name, job)
