"""Devices, links, availability and ranks. No torch here."""

from fedllm.system.cost import ModelCost
from fedllm.system.ranks import (
    MemoryRule,
    RankRule,
    TierRule,
    WeightedRule,
    apportion,
    rank_rule,
)
from fedllm.system.simulated import SimulatedWorld
from fedllm.system.world import Ideal, Work, World

__all__ = [
    "Ideal",
    "MemoryRule",
    "ModelCost",
    "RankRule",
    "SimulatedWorld",
    "TierRule",
    "WeightedRule",
    "Work",
    "World",
    "apportion",
    "rank_rule",
]
