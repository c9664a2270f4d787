"""The protocol between server, clients, engine and executors."""

from fedllm.federation.base import NOBODY, BaseServer, Count, MixedRank, weighted
from fedllm.federation.client import BaseClient, HeadPolicy, visible
from fedllm.federation.clusters import ClusteredServer
from fedllm.federation.controls import (
    ControlClient,
    ControlServer,
    SharedPass,
    controls,
    is_own_pass,
)
from fedllm.federation.expert_paths import ExpertClient, ExpertServer
from fedllm.federation.fresh_start import FreshStartServer
from fedllm.federation.late_bases import LateBasisServer
from fedllm.federation.local_path import (
    LOCAL,
    LocalPathClient,
    LocalPathServer,
    MixedPathServer,
)
from fedllm.federation.messages import ClientId, FitResult, Job, Mix, Part, Payload, Update
from fedllm.federation.moments import MomentServer, StepServer
from fedllm.federation.objective import (
    Objective,
    forward_passes,
    objective_of,
    task_of,
    trained_lengths,
    trained_share,
)
from fedllm.federation.own_copy import OwnCopyClient, OwnCopyServer
from fedllm.federation.plan import Plan
from fedllm.federation.protocols import Engine, Executor, FitRequest, Progress, StateStore
from fedllm.federation.pruned_ranks import PrunedRankClient, PrunedRankServer
from fedllm.federation.rest_path import RestPathClient, RestPathServer
from fedllm.federation.scoring import AnswerScores, Scorer, Scores, View
from fedllm.federation.stages import PERSONAL, RestingServer, StagedServer
from fedllm.federation.state import Codec, MemoryStore, restore_server, server_state
from fedllm.federation.tiers import CLUSTER, LEAF, ROOT, TieredClient, TieredServer

__all__ = [
    "CLUSTER",
    "LEAF",
    "LOCAL",
    "NOBODY",
    "PERSONAL",
    "ROOT",
    "AnswerScores",
    "BaseClient",
    "BaseServer",
    "ClientId",
    "ClusteredServer",
    "Codec",
    "ControlClient",
    "ControlServer",
    "Count",
    "Engine",
    "Executor",
    "ExpertClient",
    "ExpertServer",
    "FitRequest",
    "FitResult",
    "FreshStartServer",
    "HeadPolicy",
    "Job",
    "LateBasisServer",
    "LocalPathClient",
    "LocalPathServer",
    "MemoryStore",
    "Mix",
    "MixedPathServer",
    "MixedRank",
    "MomentServer",
    "Objective",
    "OwnCopyClient",
    "OwnCopyServer",
    "Part",
    "Payload",
    "Plan",
    "Progress",
    "PrunedRankClient",
    "PrunedRankServer",
    "RestPathClient",
    "RestPathServer",
    "RestingServer",
    "Scorer",
    "Scores",
    "SharedPass",
    "StagedServer",
    "StateStore",
    "StepServer",
    "TieredClient",
    "TieredServer",
    "Update",
    "View",
    "controls",
    "forward_passes",
    "is_own_pass",
    "objective_of",
    "restore_server",
    "server_state",
    "task_of",
    "trained_lengths",
    "trained_share",
    "visible",
    "weighted",
]
