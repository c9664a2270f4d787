"""Local training only: every client trains an adapter of its own and sends nothing.

Paper: none; the lower bound of every personalised method (algorithms.md, 7.1).
Box:   client k trains (A_k, B_k) from the common start, round after round.
Fields: (A_k, B_k) and the head live in the client's private state.
Evidence: the definition; the optimiser starts anew each round, as in all methods here.
The global view is the common start, that is the base model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedllm.federation import BaseClient, BaseServer, ClientId, Job, MixedRank


@dataclass(kw_only=True)
class Server(BaseServer):
    """Has nothing to send and gets nothing to average."""

    mixed_rank: ClassVar[MixedRank] = "exact"
    is_personal: ClassVar[bool] = True
    recoordinated: ClassVar[str] = "its clients share nothing"

    def is_known(self, name: str, cid: ClientId) -> bool:
        """Everything follows from the seed or is the client's own."""
        return True


class Client(BaseClient):
    """Trains A, B and the head, and keeps them."""

    def kept(self, name: str, job: Job) -> bool:
        """Nothing leaves the client; a frozen head needs no keeping."""
        return self.trainable(name, job)
