"""SCAFFOLD: control variates take the drift of each client out of its gradients.

Paper: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
       ICML 2020, arXiv:1910.06378.
Box:   y <- y - lr (g(y) + c - c_k);  c_k+ = g(x_t) (option I) or c_k - c + (x_t - y) / (E lr) (II);
       x <- x + eta mean_S(y_k - x);  c <- c + (1 / N) sum_S (c_k+ - c_k).
Fields: c is `control`, c_k a private note, E lr the sum of the learning rates done; eta is
       `server_learning_rate`. The mean is the method's own (the paper's: `weights: uniform`).
Evidence: from memory, cross-read with OpenFedLLM, which corrects after AdamW's step; here gradients
are corrected before the moments. Option II is right for plain SGD only and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedllm.adapters import linear
from fedllm.federation import (
    ControlClient,
    ControlServer,
    Engine,
    Job,
    SharedPass,
    StepServer,
    controls,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Server(StepServer, ControlServer):
    """Averages control variates, and goes eta times as far as the method would."""

    option: Literal["I", "II"] = "I"
    """How a client renews c_k: the gradient at the download over all its rows, or what it did."""


class Client(ControlClient):
    """Corrects its gradients by c - c_k."""

    def takes_gradient(self, job: Job) -> bool:
        """Option II needs none."""
        return bool(job.settings["option"] == "I")

    async def renewed(self, done: SharedPass, engine: Engine) -> Mapping[str, Tensor]:
        """Return c_k+ by the option that is set."""
        job, result = done.job, done.result
        if job.settings["option"] == "I" or not result.num_steps:
            return await super().renewed(done, engine)
        way = linear.subtract(done.start.tensors, result.adapter.tensors)
        slope = linear.scale(way, 1.0 / result.metrics["rate_sum"])
        return linear.add(linear.subtract(slope, job.payload.extra), controls(job))
