"""LoRA-FAIR: average the factors, then correct B so that B A comes closer to the average product.

Paper: Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
       Refinement", ICCV 2025, arXiv:2411.14961.
Box:   A = sum_k p_k A_k,  B = sum_k p_k B_k,  M = sum_k p_k B_k A_k;
       dB = argmin of D(M, (B + dB) A) + lambda ||dB||;  clients get A and B + dB.
Fields: lambda is `strength`; D is 1 - cos with `solver: cosine_sgd`, which is the paper's.
Evidence: a summary, and a ridge form in the ILoRA authors' code, here `solver: ridge`: dB = (M - B
A) A^T (A A^T + lambda I)^-1, never worse than FedIT. The paper's steps were not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedllm.adapters import algebra, alignment
from fedllm.federation import BaseClient, BaseServer, Part, weighted


@dataclass(kw_only=True)
class Server(BaseServer):
    """Averages factors and corrects B."""

    recoordinated: ClassVar[str] = "the server corrects B after averaging it"

    solver: Literal["ridge", "cosine_sgd"] = "ridge"
    """In closed form, or gradient steps on the paper's objective."""
    strength: Annotated[float, Field(ge=0)] = 0.01
    """lambda: how strongly B is held where it is."""
    steps: Annotated[int, Field(ge=1)] = 100
    """Gradient steps of `cosine_sgd`."""
    step_size: Annotated[float, Field(gt=0)] = 0.01
    """Size of such a step."""

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Average as FedIT does, then correct B."""
        super().aggregate(parts)
        wanted = algebra.mean_products([(w, a.body) for w, a in weighted(parts)])
        if self.solver == "ridge":
            corrected = alignment.ridge_correction(wanted, self.adapter, self.strength)
        else:
            corrected = alignment.cosine_correction(
                wanted, self.adapter, self.strength, self.steps, self.step_size
            )
        self.adapter = self.adapter.overlaid(corrected)


class Client(BaseClient):
    """Trains A, B and the head, and sends all of them."""
