"""RoLoRA: odd rounds train and average B, even rounds A; the other half is frozen.

Paper: Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
       NeurIPS 2025, arXiv:2502.01755 (which calls our A down-projection and our B up-projection).
Box:   rounds 1, 3, ...: B <- sum_k p_k B_k with A frozen;  rounds 2, 4, ...: A likewise.
       Exact, since the frozen half is common: sum_k p_k B_k A = (sum_k p_k B_k) A.
Fields: round number is `version + 1`; `flip_every` versions make a round.
Evidence: abstract and summary read, formulas from another group's code. B comes first: while
B = 0 the gradient of A is zero, so a first round on A would be lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from fedllm.adapters import is_a, is_b
from fedllm.federation import BaseClient, BaseServer, ClientId, Job, MixedRank


@dataclass(kw_only=True)
class Server(BaseServer):
    """Says which half the round trains, and sends the halves a client does not hold."""

    mixed_rank: ClassVar[MixedRank] = "padded"
    flip_every: Annotated[int, Field(ge=1)] = 1
    """Server updates between changes of the half: 1 in sync, about a cohort in async."""

    @property
    def stage(self) -> str:
        """Name the half that is trained."""
        return "train_b" if (self.version // self.flip_every) % 2 == 0 else "train_a"

    def is_known(self, name: str, cid: ClientId) -> bool:
        """A tensor that has not changed since the client's last download is not sent again."""
        return self.is_unchanged(name, cid) or super().is_known(name, cid)


class Client(BaseClient):
    """Trains the half named by the stage, and the head."""

    def trainable(self, name: str, job: Job) -> bool:
        """The other half is frozen."""
        frozen = is_a if job.stage == "train_b" else is_b
        return not frozen(name) and super().trainable(name, job)
