"""From `federation.schedule` to the schedule of the loop, and which settings go with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm.config import (
    AsyncSchedule,
    BufferedSchedule,
    Config,
    FederationConfig,
    SemiSyncSchedule,
    SequentialSchedule,
    SyncSchedule,
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


def problems(config: Config) -> list[str]:
    """Return what does not go with the schedule, one sentence each."""
    federation, schedule = config.federation, config.federation.schedule
    clients, wrong = federation.num_clients, []
    if isinstance(schedule, BufferedSchedule) and schedule.size > clients:
        wrong.append(
            f"federation.schedule.size: a client has one update in the buffer at a time, so"
            f" {clients} clients never fill {schedule.size}; set it to {clients} or less"
        )
    if isinstance(schedule, SemiSyncSchedule) and schedule.tiers > federation.cohort:
        wrong.append(
            f"federation.schedule.tiers: {schedule.tiers} tiers share a cohort of"
            f" {federation.cohort}; set federation.cohort_size to {schedule.tiers} or more"
        )
    if isinstance(schedule, SyncSchedule) and schedule.min_updates > federation.cohort:
        wrong.append(
            f"federation.schedule.min_updates: {schedule.min_updates} updates cannot come from a"
            f" cohort of {federation.cohort}; lower it, or raise federation.cohort_size"
        )
    if isinstance(schedule, SequentialSchedule) and (federation.cohort_size or 1) != 1:
        wrong.append(
            "federation.cohort_size: 'sequential' takes one client after another; take it out"
        )
    return [*wrong, *_uncompared(config), *_unaccounted(config)]


def _uncompared(config: Config) -> list[str]:
    """Refuse rules that compare updates, where these start from different versions."""
    name = config.federation.schedule.name
    if name == "sync" or config.updates.robust.name in ("mean", "norm-bound"):
        return []
    return [
        f"updates.robust: '{config.updates.robust.name}' compares updates of one version, and with"
        f" '{name}' they start from different ones; use mean or norm-bound, or schedule: sync"
    ]


def _unaccounted(config: Config) -> list[str]:
    """Refuse privacy where nobody can say how clients were sampled."""
    if config.updates.privacy is None:
        return []
    federation, schedule = config.federation, config.federation.schedule
    if not isinstance(schedule, SyncSchedule):
        return [
            f"updates.privacy: cohorts of '{schedule.name}' are no uniform samples, which an"
            " epsilon needs; use schedule: sync"
        ]
    wrong = []
    if schedule.over_selection > 1.0:
        wrong.append(
            "updates.privacy: with over_selection the fastest of a sample count, and an epsilon"
            " needs a sample of fixed size; take federation.schedule.over_selection out"
        )
    if config.mode == "realistic" and federation.selection == "available":
        wrong.append(
            "updates.privacy: who is available decides the cohort, which no accountant covers;"
            " set federation.selection: any"
        )
    return wrong
