"""FedALT: a client mixes its own adapter with the frozen mean of everyone else's.

Paper: Bian et al., "FedALT: Federated Fine-Tuning through Adaptive Local Training with
       Rest-of-World LoRA", AAAI 2026, arXiv:2503.11880.
Box:   y = W x + s (g_0 B_0 A_0 x + g_1 B_1 A_1 x),  (g_0, g_1) = softmax(R x);  client k trains
       (A_1, B_1), which it sends and keeps, and R, which it keeps;
       (A_0, B_0) of client k <- mean over j != k of (A_1, B_1) of j.
Fields: (A_0, B_0) is slot "rest", with B_0 = 0 at first; `weights` of the mean.
Evidence: official code read (jmbian/FedALT), where all take part in all rounds and weigh alike.
Here the server keeps everyone's latest upload. A shared head is averaged over the cohort. The
global view is the mean of all, alone: the rest of the world of a client that never took part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedllm.federation import RestPathClient, RestPathServer


@dataclass(kw_only=True)
class Server(RestPathServer):
    """Keeps what each client sent last, and sends each client the mean of the others."""

    recoordinated: ClassVar[str] = "a client goes on from its own adapter, not from its download"

    weights: Literal["samples", "uniform"] = "uniform"
    """Weigh the others by their number of training rows, or all alike."""


class Client(RestPathClient):
    """Trains its own adapter and router; sends the adapter, and keeps both."""
