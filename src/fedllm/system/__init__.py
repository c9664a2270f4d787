"""Devices, links, availability and ranks. No torch here."""

from fedllm.system.ranks import (
    MemoryRule,
    RankRule,
    TierRule,
    WeightedRule,
    apportion,
    rank_rule,
)
from fedllm.system.world import Ideal, Work, World

__all__ = [
    "Ideal",
    "MemoryRule",
    "RankRule",
    "TierRule",
    "WeightedRule",
    "Work",
    "World",
    "apportion",
    "rank_rule",
]
