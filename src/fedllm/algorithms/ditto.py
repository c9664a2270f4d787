"""Ditto: a global model by FedIT, and a personal one that is drawn towards it.

Paper: Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
       arXiv:2012.04221.
Box:   x by the base method;  v_k <- v_k - lr (grad f_k(v_k) + lambda (v_k - x_t)).
Fields: lambda is `strength`; x_t is the download; v_k, with a head of its own, lives in the
       client's private state, and is x_0 at first contact.
Evidence: another group's implementation (FederatedScope) and memory; lambda 0.1 is its default.
The penalty is part of the loss, so AdamW sees it before its moments. With lambda = 0 v_k is local
training, and x is FedIT's whatever lambda is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedllm.adapters import penalties
from fedllm.federation import PERSONAL, Job, OwnCopyClient, OwnCopyServer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Server(OwnCopyServer):
    """Averages and sends x."""

    strength: Annotated[float, Field(ge=0)] = 0.1
    """lambda: how strongly the personal model is drawn towards the global one."""


class Client(OwnCopyClient):
    """Trains x, then v_k, and sends x."""

    def penalty(self, live: Mapping[str, Tensor], job: Job) -> Tensor | None:
        """Draw v_k towards the download; x is free."""
        if job.stage != PERSONAL:
            return None
        strength: float = job.settings["strength"]
        return penalties.square_distance(live, job.payload.adapter.tensors) * (strength / 2)
