"""The configuration tree and the way from YAML to it. No torch here."""

from fedllm.config.load import apply_overrides, dump, read, validate
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
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FederationConfig",
    "ModelConfig",
    "PartitionConfig",
    "TrainingConfig",
    "apply_overrides",
    "dump",
    "read",
    "validate",
]
