"""The configuration tree and the way from YAML to it. No torch here."""

from fedllm.config.exchange import CommunicationConfig, Named, PrivacyConfig, UpdatesConfig
from fedllm.config.load import apply_overrides, dump, read, validate
from fedllm.config.ranks import (
    BudgetRange,
    RankDistribution,
    RankMemory,
    RankPolicy,
    RankTiers,
    Tier,
    means_mixed_ranks,
    ranks_in,
)
from fedllm.config.schedules import (
    AnySchedule,
    AsyncSchedule,
    BufferedSchedule,
    SemiSyncSchedule,
    SequentialSchedule,
    SyncSchedule,
)
from fedllm.config.schema import (
    AdapterConfig,
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    ModelConfig,
    PartitionConfig,
    TrainingConfig,
)

__all__ = [
    "AdapterConfig",
    "AlgorithmConfig",
    "AnySchedule",
    "AsyncSchedule",
    "BudgetRange",
    "BufferedSchedule",
    "CheckpointConfig",
    "CommunicationConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FederationConfig",
    "ModelConfig",
    "Named",
    "PartitionConfig",
    "PrivacyConfig",
    "RankDistribution",
    "RankMemory",
    "RankPolicy",
    "RankTiers",
    "SemiSyncSchedule",
    "SequentialSchedule",
    "SyncSchedule",
    "Tier",
    "TrainingConfig",
    "UpdatesConfig",
    "apply_overrides",
    "dump",
    "means_mixed_ranks",
    "ranks_in",
    "read",
    "validate",
]
