"""HetLoRA: ranks differ; clients prune their own, and the server weighs them by their norms.

Paper: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
       EMNLP 2024, arXiv:2401.06432.
Box:   down: A[:r_k], B[:, :r_k];  loss + lambda ||A[g r_k:]|| ||B[:, g r_k:]||; if that tail is
       smaller after training than before, only g r_k ranks are kept;
       up, zero-padded:  A <- sum_k w_k A_k,  B <- sum_k w_k B_k,  w_k ~ ||s_k B_k A_k||_F.
Fields: g is `gamma`, lambda `strength`; the server takes r_k from what a client sent last.
Evidence: abstract, a figure and a summary; pruning from another group's incomplete code. w_k is
over all layers together; how s enters was not seen. If all norms are 0 clients weigh alike. What
is kept is floor(g r_k): rounded up, a rank below 100 would never be pruned at the default g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from fedllm.adapters import linear, measure, pruning
from fedllm.federation import Job, MixedRank, Part, PrunedRankClient, PrunedRankServer, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Server(PrunedRankServer):
    """Averages padded factors by norm."""

    mixed_rank: ClassVar[MixedRank] = "padded"
    recoordinated: ClassVar[str] = "ranks shrink on the way, and clients weigh by their norms"

    strength: Annotated[float, Field(ge=0)] = 1e-3
    """lambda: how strongly the tail is drawn to zero."""

    def weight(self, update: Update) -> float:
        """Weigh by the norm of what was trained; never by nothing at all."""
        return measure.adapter_norm(update.adapter.body) or 1e-12

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Average with absent ranks as zeros."""
        sent = self.noted(parts)
        self.adapter = self.adapter.overlaid(linear.mean_padded(sent, self.adapter))


class Client(PrunedRankClient):
    """Draws the tail of its rank to zero, and cuts it off when it has shrunk."""

    def penalty(self, live: Mapping[str, Tensor], job: Job) -> Tensor | None:
        """Weigh the tails."""
        gamma, smallest = job.settings["gamma"], job.settings["smallest_rank"]
        tail: Tensor = pruning.tail_size(live, gamma, smallest)
        return tail * float(job.settings["strength"])
