"""FedDPA-T: in each round a local adapter is trained beside the frozen global one, which follows.

Paper: Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024,
       arXiv:2403.19211.
Box:   round 0: G alone.  Later: (i) y = W x + a s B_l A_l x + (1 - a) s B_g A_g x, L trained;
       (ii) y = W x + s B_g A_g x, G trained and sent;  G <- sum_k p_k G_k;  L = 0 at its start.
       Instance x: w = lambda c, y = W x + (1 - w) s B_g A_g x + w s B_l A_l x.
Fields: a is `mix`, lambda `strength`; c is the mean cosine similarity to `references` instances.
Evidence: official code read (Lydia-yang/FedDPA), whose means are uniform (`weights`). The equation
of w is from memory of the paper; the released script gives w to G and 1 - w to L, which is
`released_mix`. A client without L yet is evaluated with G; the head belongs to pass (ii).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fedllm.adapters import Adapter
from fedllm.federation import LOCAL, Job, LocalPathClient, MixedPathServer


@dataclass(kw_only=True)
class Server(MixedPathServer):
    """Averages and sends G."""

    mix: Annotated[float, Field(ge=0, le=1)] = 0.5
    """a: weight of the local path while it is trained; the global one has the rest."""
    local_rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of L; None is that of G."""

    def prepare(self) -> None:
        """Lend every client the same L."""
        self.lend(self.local_rank or self.adapter.rank)


class Client(LocalPathClient):
    """Trains L with the received G, then G without L."""

    def passes(self, job: Job) -> Sequence[str]:
        """There is no L in the first round."""
        return (LOCAL, "") if job.version > 0 else ("",)

    def active(self, held: Adapter, job: Job) -> Adapter:
        """Weigh the paths in pass (i); leave L out in pass (ii)."""
        a: float = job.settings["mix"]
        return held.weighed({"": 1 - a, LOCAL: a}) if job.stage == LOCAL else held.moved("")
