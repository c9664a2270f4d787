"""pFedLoRA-style: a private adapter and a shared one, trained in turn with the other frozen.

Paper: Yi et al., "pFedLoRA: Model-Heterogeneous Personalized Federated Learning with LoRA Tuning",
       arXiv:2310.13283.
Box:   y = W x + m s B_p A_p x + (1 - m) s B_g A_g x;  (i) G frozen, P_k trained;  (ii) P_k frozen,
       G trained and sent;  G <- sum_k p_k G_k.  Clients answer with the same y.
Fields: m is `mix`, the rank of P_k `local_rank`; with `order: global-first` (ii) comes before (i).
Evidence: abstract read, the rest from memory. The paper's clients own whole models that differ and
mix two losses; with one backbone P_k is a second adapter, and m mixes outputs. It is FedDPA-T with
the private adapter active in both passes and the weights fixed. The head belongs to pass (ii).
The global view is W + (1 - m) s B_g A_g, as G was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fedllm.federation import LOCAL, Job, LocalPathClient, LocalPathServer


@dataclass(kw_only=True)
class Server(LocalPathServer):
    """Averages and sends G."""

    mix: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """m: weight of the private adapter; the shared one has the rest."""
    order: Literal["local-first", "global-first"] = "local-first"
    """Which adapter a round trains first."""
    local_rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of P_k; None is that of G."""

    def prepare(self) -> None:
        """Lend every client the same first P, and fix the weights of both."""
        self.lend(self.local_rank or self.adapter.rank)
        self.adapter = self.adapter.weighed({"": 1 - self.mix, LOCAL: self.mix})


class Client(LocalPathClient):
    """Trains P and G in turn, both active."""

    def passes(self, job: Job) -> Sequence[str]:
        """One pass each."""
        return (LOCAL, "") if job.settings["order"] == "local-first" else ("", LOCAL)
