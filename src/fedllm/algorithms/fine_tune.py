"""Fine-tuning after federation (FedIT-FT): the last rounds train each client's own copy.

Paper: the usual baseline of personalised methods, as "FedAvg-FT" or "FedIT-FT".
Box:   T - E rounds of FedIT give x;  then client k trains v_k for E rounds, from v_k = x.
Fields: E is `tune_rounds`, T the run's rounds; v_k lives in the client's private state.
Evidence: the definition (algorithms.md, 7.2). All clients take part in the last E rounds, send
nothing, and leave x as it is; x is not sent again to who holds it. With E = 0 it is FedIT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fedllm.federation import PERSONAL, BaseClient, Job, RestingServer


@dataclass(kw_only=True)
class Server(RestingServer):
    """Is FedIT until the last rounds, and rests then."""

    tune_rounds: Annotated[int, Field(ge=0)] = 1
    """Rounds at the end that train each client's own copy."""

    @property
    def rest_rounds(self) -> int:
        """The rounds in which all tune."""
        return self.tune_rounds


class Client(BaseClient):
    """Sends what it trained, and keeps it instead while all tune."""

    def kept(self, name: str, job: Job) -> bool:
        """The tuned copy stays with the client."""
        is_own = job.stage == PERSONAL and self.trainable(name, job)
        return is_own or super().kept(name, job)
