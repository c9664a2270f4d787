"""The protocol between server, clients, engine and executors."""

from fedllm.federation.base import (
    BaseClient,
    BaseServer,
    HeadPolicy,
    MixedRank,
    visible,
    weighted,
)
from fedllm.federation.messages import ClientId, FitResult, Job, Mix, Part, Payload, Update
from fedllm.federation.plan import Plan
from fedllm.federation.protocols import Engine, Executor, FitRequest, Progress, StateStore
from fedllm.federation.scoring import Scorer, Scores, View
from fedllm.federation.state import Codec, MemoryStore, restore_server, server_state

__all__ = [
    "BaseClient",
    "BaseServer",
    "ClientId",
    "Codec",
    "Engine",
    "Executor",
    "FitRequest",
    "FitResult",
    "HeadPolicy",
    "Job",
    "MemoryStore",
    "Mix",
    "MixedRank",
    "Part",
    "Payload",
    "Plan",
    "Progress",
    "Scorer",
    "Scores",
    "StateStore",
    "Update",
    "View",
    "restore_server",
    "server_state",
    "visible",
    "weighted",
]
