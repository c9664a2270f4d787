"""Devices, links, availability and ranks. No torch here."""

from fedllm.system.ranks import RankRule
from fedllm.system.world import Ideal, World

__all__ = ["Ideal", "RankRule", "World"]
