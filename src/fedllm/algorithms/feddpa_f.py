"""FedDPA-F: FedIT first; then each client trains a local copy of the final global adapter.

Paper: Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024,
       arXiv:2403.19211.
Box:   T - E rounds of FedIT give G;  L <- G, and E rounds of y = W x + a s B_l A_l x +
       (1 - a) s B_g A_g x train L with G frozen;  instances are answered as in FedDPA-T.
Fields: E is `personal_rounds`, a `mix`; all take part in the last E rounds, and send nothing.
Evidence: official code read (Lydia-yang/FedDPA); whether G is active while L is trained was not
seen, hence a = 1 by default: L alone. The head is G's, and rests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fedllm.algorithms import feddpa_t
from fedllm.federation import LOCAL, ClientId, Job, MixedPathServer, Payload, RestingServer


@dataclass(kw_only=True)
class Server(RestingServer, MixedPathServer):
    """Is FedIT until the last rounds, and rests then."""

    mix: Annotated[float, Field(ge=0, le=1)] = 1.0
    """a: weight of L while it is trained; G has the rest."""
    personal_rounds: Annotated[int, Field(ge=1)] = 1
    """Rounds at the end that train the local adapters."""

    @property
    def rest_rounds(self) -> int:
        """The rounds in which all train their local adapters."""
        return self.personal_rounds

    def prepare(self) -> None:
        """There is no L yet."""

    def download(self, cid: ClientId) -> Payload:
        """Let L start as a copy of the final G, which needs no sending."""
        if not self.is_whole:
            return super().download(cid)
        return self.payload(cid, self.adapter.joined(self.adapter.body.moved(LOCAL)))


class Client(feddpa_t.Client):
    """Trains G, and L in its place in the last rounds."""

    def passes(self, job: Job) -> Sequence[str]:
        """One pass in each round; only the rounds that train L have a stage with a name."""
        return (LOCAL,) if job.stage else ("",)
