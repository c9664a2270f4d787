"""Settings that do not go with a schedule are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from fedllm.errors import ConfigError
from fedllm.experiment import make_config

PRIVATE = {"privacy": {"clip": 1.0, "noise_multiplier": 1.0}}


def problems(*, updates: Any = None, mode: str = "prototype", **federation: Any) -> list[str]:
    tree = {
        "mode": mode,
        "federation": {"num_clients": 6, **federation},
        "updates": updates or {},
    }
    try:
        make_config(tree)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("federation", "told"),
    [
        ({"schedule": {"name": "buffered", "size": 7}}, "never fill 7; set it to 6 or less"),
        ({"schedule": {"name": "semi-sync", "tiers": 3}, "cohort_size": 2}, "cohort_size to 3"),
        ({"schedule": {"name": "sync", "min_updates": 7}}, "7 updates cannot come from a"),
        ({"schedule": "sequential", "cohort_size": 2}, "take it out"),
    ],
)
def test_what_can_never_be_ready_is_refused(federation: dict[str, Any], told: str) -> None:
    (problem,) = problems(**federation)
    assert told in problem


@pytest.mark.parametrize("schedule", ["sync", {"name": "buffered", "size": 6}, "async"])
def test_what_can_be_ready_is_not(schedule: Any) -> None:
    assert problems(schedule=schedule) == []
    assert problems(schedule=schedule, cohort_size=2) == []


@pytest.mark.parametrize("name", ["buffered", "async", "semi-sync"])
def test_updates_of_different_versions_are_not_compared(name: str) -> None:
    schedule = {"name": name, "size": 5} if name == "buffered" else {"name": name}
    (problem,) = problems(schedule=schedule, updates={"robust": "median"})
    assert problem.startswith("updates.robust: 'median' compares updates of one version")
    bounded = {"robust": {"name": "norm-bound", "bound": 1.0}}
    assert problems(schedule=schedule, updates=bounded) == []


@pytest.mark.parametrize("name", ["async", "semi-sync", "sequential"])
def test_no_epsilon_is_claimed_for_cohorts_that_are_no_uniform_samples(name: str) -> None:
    (problem,) = problems(schedule=name, updates=PRIVATE)
    assert "schedule: sync" in problem


def test_no_epsilon_is_claimed_where_speed_or_availability_decides() -> None:
    over = {"name": "sync", "over_selection": 1.5}
    told = problems(schedule=over, updates=PRIVATE, mode="realistic")
    assert len(told) == 2
    assert "over_selection" in told[0]
    assert "federation.selection: any" in told[1]
    assert problems(updates=PRIVATE) == []
    assert problems(updates=PRIVATE, mode="realistic", selection="any") == []
