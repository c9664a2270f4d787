"""FedAvgM: the server moves with momentum.

Paper: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
       Classification", 2019, arXiv:1909.06335.
Box:   D = sum_k p_k (x_k - x);  v <- beta v + D;  x <- x + eta v.
Fields: beta is `momentum`, eta `server_learning_rate`, v `first_moment`.
Evidence: from memory, cross-read with Flower, which agrees. OpenFedLLM damps D by 1 - beta after
the first round, which is another algorithm (its eta is ten times smaller).
With beta = 0 and eta = 1 it is the method alone; under a constant D a round moves D / (1 - beta).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedllm.federation import BaseClient, StepServer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Server(StepServer):
    """Keeps a velocity for each tensor."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """beta: how much of the velocity stays."""
    first_moment: dict[str, Tensor] = field(default_factory=dict, init=False)

    def step(self, name: str, change: Tensor) -> Tensor:
        """Return eta v."""
        before = self.first_moment.get(name)
        velocity = change if before is None else before * self.momentum + change
        self.first_moment = {**self.first_moment, name: velocity}
        return velocity * self.server_learning_rate


class Client(BaseClient):
    """Trains as its method does."""
