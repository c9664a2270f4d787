"""FedAdam: the server moves by Adam on the mean change.

Paper: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv:2003.00295.
Box:   D = sum_k p_k (x_k - x);  m <- b1 m + (1 - b1) D;  v <- b2 v + (1 - b2) D^2;
       x <- x + eta m / (sqrt(v) + tau).
Fields: b1 is `beta1`, tau `tau`, eta `server_learning_rate`, m and v the moments; m_0 = 0 and
       v_0 = tau^2. The paper's D is the uniform mean: `weights: uniform`.
Evidence: from memory, cross-read with Flower and OpenFedLLM, which deviate from the paper (v_0 = 0
and a corrected eta; m squared in the place of D). There is no bias correction, unlike in Flower.
B starts at 0 and barely moves A in a first short round: keep eta small or tau large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedllm.federation import BaseClient, MomentServer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Server(MomentServer):
    """Keeps two moments for each tensor."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """b1: how much of the first moment stays."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """b2: how much of the second moment stays."""

    def second(self, before: Tensor, square: Tensor) -> Tensor:
        """Return the next v from the last one and D^2."""
        return before * self.beta2 + square * (1 - self.beta2)


class Client(BaseClient):
    """Trains as its method does."""
