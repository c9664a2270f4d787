"""From `federation.schedule` to the schedule of the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm.config import (
    AsyncSchedule,
    BufferedSchedule,
    FederationConfig,
    SemiSyncSchedule,
    SequentialSchedule,
)
from fedllm.simulation import Async, Buffered, Schedule, SemiSync, Sequential, Sync


def schedule_of(federation: FederationConfig) -> Schedule:
    """Return the schedule that a configuration asks for."""
    config, cohort_size = federation.schedule, federation.cohort
    match config:
        case BufferedSchedule() | AsyncSchedule():
            common: Mapping[str, Any] = {
                "cohort_size": cohort_size,
                "staleness": config.staleness,
                "a": config.a,
                "b": config.b,
                "latest": config.max_staleness,
            }
            if isinstance(config, AsyncSchedule):
                return Async(alpha=config.alpha, **common)
            eta, wait_s = config.server_learning_rate, config.deadline_s
            return Buffered(size=config.size, server_learning_rate=eta, wait_s=wait_s, **common)
        case SemiSyncSchedule():
            is_slow_first = config.tier_weights == "slow-first"
            return SemiSync(
                cohort_size=cohort_size, tiers=config.tiers, is_slow_first=is_slow_first
            )
        case SequentialSchedule():
            return Sequential(wait_s=config.deadline_s, is_reshuffled=config.reshuffle)
    return Sync(
        cohort_size=cohort_size,
        over_selection=config.over_selection,
        min_updates=config.min_updates,
        wait_s=config.deadline_s,
    )
