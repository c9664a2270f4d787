"""FedProx: each client is drawn towards the model it downloaded.

Paper: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv:1812.06127.
Box:   client k minimises f_k(x) + (mu / 2) || x - x_t ||^2 over what it trains; aggregation is the
       method's own (FedIT's where none is named).
Fields: mu is `mu`; x_t is the download.
Evidence: from memory, cross-read with OpenFedLLM, whose default 0.01 is kept.
What is the client's own, be it tensors or a whole pass, is left alone: x_t is what is shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedllm.adapters import penalties
from fedllm.federation import BaseClient, BaseServer, Job, is_own_pass

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Server(BaseServer):
    """Aggregates as its method does."""

    mu: Annotated[float, Field(ge=0)] = 0.01
    """Strength of the proximal term."""


class Client(BaseClient):
    """Adds the proximal term to its method's loss."""

    def penalty(self, live: Mapping[str, Tensor], job: Job) -> Tensor | None:
        """Return (mu / 2) || x - x_t ||^2 and what the method adds."""
        other = super().penalty(live, job)
        if is_own_pass(job):
            return other
        anchor = job.payload.adapter.tensors
        near = {n: t for n, t in live.items() if n in anchor and not self.kept(n, job)}
        if not near:
            return other
        term: Tensor = penalties.square_distance(near, anchor) * (float(job.settings["mu"]) / 2)
        return term if other is None else term + other
