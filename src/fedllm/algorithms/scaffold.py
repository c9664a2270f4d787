"""SCAFFOLD: control variates take the drift of each client out of its gradients.

Paper: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
       ICML 2020, arXiv:1910.06378.
Box:   y <- y - lr (g(y) + c - c_k);  c_k+ = g(x_t) (option I) or c_k - c + (x_t - y) / (E lr) (II);
       x <- x + eta mean_S(y_k - x);  c <- c + (1 / N) sum_S (c_k+ - c_k).
Fields: c is `control`, c_k a private note, E lr the sum of the learning rates done; eta is
       `server_learning_rate`. The mean is the method's own (the paper's: `weights: uniform`).
Evidence: from memory, cross-read with OpenFedLLM, which corrects after AdamW's step; here gradients
are corrected before the moments. Option II is right for plain SGD only and refused with AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedllm.adapters import linear
from fedllm.federation import ControlClient, ControlServer, Engine, Job, Part, Update, controls

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Server(ControlServer):
    """Averages models and control variates."""

    option: Literal["I", "II"] = "I"
    """How a client renews c_k: the gradient at the download over all its rows, or what it did."""
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    """eta: how far the server goes towards the mean."""

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Go eta times as far as the method would."""
        before = self.adapter.tensors
        super().aggregate(parts)
        far = linear.subtract(self.adapter.tensors, before)
        if self.server_learning_rate != 1.0:
            self.adapter = self.adapter.overlaid(linear.add(before, far, self.server_learning_rate))


class Client(ControlClient):
    """Corrects its gradients by c - c_k."""

    async def renewed(self, update: Update, job: Job, engine: Engine) -> Mapping[str, Tensor]:
        """Return c_k+ by the option that is set."""
        if job.settings["option"] == "I" or not update.num_steps:
            return await super().renewed(update, job, engine)
        done = linear.subtract(job.payload.adapter.tensors, update.adapter.tensors)
        slope = linear.scale(done, 1.0 / update.metrics["rate_sum"])
        fixed = linear.subtract(controls(job), {})
        return linear.add(linear.subtract(slope, job.payload.extra), fixed)
