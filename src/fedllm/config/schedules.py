"""When the server aggregates: one section for each schedule, chosen by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveFloat, PositiveInt, Tag

from fedllm.config.section import Section

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Staleness = Literal["constant", "polynomial", "hinge"]


class SyncSchedule(Section):
    """Rounds: the server waits for its cohort, or until a deadline."""

    name: Literal["sync"] = "sync"
    """Name of the schedule."""
    deadline_s: PositiveFloat | None = None
    """Virtual seconds after which a round ends with what has arrived; absent: it waits for all."""
    over_selection: Annotated[float, Field(ge=1.0)] = 1.0
    """Ask so many times `cohort_size` clients, and take the first `cohort_size` updates."""
    min_updates: PositiveInt = 1
    """With fewer updates a round leaves the model as it is, and counts all the same."""


class BufferedSchedule(Section):
    """FedBuff: clients work all the time, and every `size` arrivals make an update."""

    name: Literal["buffered"]
    """Name of the schedule."""
    size: PositiveInt = 10
    """Updates in one aggregation (K)."""
    staleness: Staleness = "polynomial"
    """How an update that is d versions late is weighed: 1, (1 + d)^-a, or 1 up to d = b and
    1 / (a (d - b) + 1) beyond."""
    a: PositiveFloat = 0.5
    """Exponent, or slope of the hinge."""
    b: Annotated[int, Field(ge=0)] = 4
    """For the hinge: up to how many versions late an update counts in full."""
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    """Drop what is more versions late than this; absent: nothing."""
    server_learning_rate: PositiveFloat = 1.0
    """eta_g: how far the model goes along the mean change."""
    deadline_s: PositiveFloat | None = None
    """Aggregate what there is after so many virtual seconds; absent: wait for `size`."""


class AsyncSchedule(Section):
    """FedAsync: every arrival is mixed in at once, x <- (1 - w) x + w x_k with w = alpha s(d)."""

    name: Literal["async"]
    """Name of the schedule."""
    alpha: Fraction = 0.6
    """Weight of an update that is not late."""
    staleness: Staleness = "polynomial"
    """As for `buffered`."""
    a: PositiveFloat = 0.5
    """Exponent, or slope of the hinge (where 10 is usual)."""
    b: Annotated[int, Field(ge=0)] = 4
    """For the hinge: up to how many versions late an update counts in full."""
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    """Drop what is more versions late than this; absent: nothing."""


class SemiSyncSchedule(Section):
    """Tiers of equally fast clients, each with rounds of its own."""

    name: Literal["semi-sync"]
    """Name of the schedule."""
    tiers: Annotated[int, Field(ge=2)] = 3
    """How many tiers of (nearly) equal size; the cohort is divided among them."""
    tier_weights: Literal["uniform", "slow-first"] = "uniform"
    """Weight of a tier's mean: 1 / tiers, or more for tiers that have updated less (FedAT)."""


class SequentialSchedule(Section):
    """One client after another, in a random order."""

    name: Literal["sequential"]
    """Name of the schedule."""
    reshuffle: bool = False
    """Draw a new order for each cycle."""
    deadline_s: PositiveFloat | None = None
    """Go on with the next client after so many virtual seconds."""


def _schedule_name(value: object) -> str:
    """Return the tag of the branch that a value, raw or made, belongs to."""
    if isinstance(value, Mapping):
        return f"name={value.get('name', '')}"
    return f"name={getattr(value, 'name', value)}"


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


AnySchedule = (
    SyncSchedule | BufferedSchedule | AsyncSchedule | SemiSyncSchedule | SequentialSchedule
)
Schedule = Annotated[
    Annotated[SyncSchedule, Tag("name=sync")]
    | Annotated[BufferedSchedule, Tag("name=buffered")]
    | Annotated[AsyncSchedule, Tag("name=async")]
    | Annotated[SemiSyncSchedule, Tag("name=semi-sync")]
    | Annotated[SequentialSchedule, Tag("name=sequential")],
    Discriminator(_schedule_name),
    BeforeValidator(_named),
]
"""A name alone, or a mapping with the name and settings."""
