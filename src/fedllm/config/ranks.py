"""What `adapter.rank` may be: one rank, a list to draw from, or a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveInt, Tag, model_validator

from fedllm.config.section import Section

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
_TOLERANCE = 1e-6
"""How far shares may be from 1: three times 0.333333 is meant to be one."""


class Tier(Section):
    """Clients of one rank."""

    rank: PositiveInt
    """LoRA rank of its clients."""
    share: Annotated[float, Field(gt=0.0, le=1.0)]
    """Part of the population that it is."""


class RankTiers(Section):
    """Exact shares of the population, the members of each tier drawn from the seed."""

    policy: Literal["tiers"]
    """Name of the policy."""
    tiers: Annotated[list[Tier], Field(min_length=1)]
    """The tiers; their shares sum to 1, and each count is within one client of its share."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks there are."""
        return tuple(tier.rank for tier in self.tiers)

    @model_validator(mode="after")
    def _whole(self) -> RankTiers:
        total = sum(tier.share for tier in self.tiers)
        if abs(total - 1.0) > _TOLERANCE:
            raise ValueError(f"the shares of the tiers sum to {total:g}; make them sum to 1")
        return self


class RankDistribution(Section):
    """Each client draws its rank by weight from (seed, client)."""

    policy: Literal["distribution"]
    """Name of the policy."""
    choices: Annotated[list[PositiveInt], Field(min_length=1)]
    """The ranks there are."""
    weights: list[Positive]
    """One for each choice; only their proportions matter."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks there are."""
        return tuple(self.choices)

    @model_validator(mode="after")
    def _paired(self) -> RankDistribution:
        if len(self.choices) != len(self.weights):
            raise ValueError(
                f"{len(self.choices)} choices have {len(self.weights)} weights; give one for each"
            )
        return self


class BudgetRange(Section):
    """A budget spread evenly over its logarithm, drawn from (seed, client)."""

    low: Positive
    """The smallest budget."""
    high: Positive
    """The largest budget."""

    @model_validator(mode="after")
    def _ordered(self) -> BudgetRange:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}; exchange them")
        return self


def _budget_form(value: object) -> str:
    if isinstance(value, str):
        return "literal[device]"
    if isinstance(value, (Mapping, BudgetRange)):
        return "form=range"
    return "list[float]" if isinstance(value, (list, tuple)) else "float"


def _device(value: object) -> object:
    if value != "device":
        raise ValueError("give megabytes (a number, a list or a range), or device")
    return value


Budget = Annotated[
    Annotated[Positive, Tag("float")]
    | Annotated[list[Positive], Field(min_length=1), Tag("list[float]")]
    | Annotated[Literal["device"], BeforeValidator(_device), Tag("literal[device]")]
    | Annotated[BudgetRange, Tag("form=range")],
    Discriminator(_budget_form),
]


class RankMemory(Section):
    """The largest rank whose training fits the client's memory.

    It takes 16 bytes (fp32 parameter, gradient and two moments of AdamW) for each parameter: rank
    x the sum over adapted layers of (out + in), and the head unless it is frozen.
    """

    policy: Literal["memory"]
    """Name of the policy."""
    choices: Annotated[list[PositiveInt], Field(min_length=1)]
    """The ranks there are."""
    budget_mb: Budget
    """Memory for the adapter in millions of bytes: one number for all, a list that each client
    draws one of, a range that each client draws from log-uniformly, or `device`: what the client's
    device has left beside weights and activations (realistic mode)."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks there are."""
        return tuple(self.choices)


def _rank_form(value: object) -> str:
    """Return the tag of the branch that a value, raw or made, belongs to."""
    if isinstance(value, (list, tuple)):
        return "list[int]"
    if isinstance(value, Mapping):
        return f"policy={value.get('policy', '')}"
    return f"policy={value.policy}" if hasattr(value, "policy") else "int"


RankPolicy = RankTiers | RankDistribution | RankMemory
Rank = Annotated[
    Annotated[PositiveInt, Tag("int")]
    | Annotated[list[PositiveInt], Field(min_length=1), Tag("list[int]")]
    | Annotated[RankTiers, Tag("policy=tiers")]
    | Annotated[RankDistribution, Tag("policy=distribution")]
    | Annotated[RankMemory, Tag("policy=memory")],
    Discriminator(_rank_form),
]
"""A tag with an equals sign is a branch, not a key: see `fedllm.config.load`."""


def ranks_in(rank: int | list[int] | RankPolicy) -> tuple[int, ...]:
    """Return the ranks that clients may have, with repetitions."""
    if isinstance(rank, int):
        return (rank,)
    return tuple(rank) if isinstance(rank, list) else rank.ranks


def means_mixed_ranks(rank: object) -> bool:
    """Tell whether an unchecked `adapter.rank` allows for more than one rank.

    >>> means_mixed_ranks({"policy": "memory", "choices": [2, 4]}), means_mixed_ranks([4, 4])
    (True, False)
    """
    listed = rank
    if isinstance(rank, Mapping):
        tiers = rank.get("tiers")
        known = tiers if isinstance(tiers, list) else []
        of_tiers = [tier["rank"] for tier in known if isinstance(tier, Mapping) and "rank" in tier]
        listed = of_tiers if rank.get("policy") == "tiers" else rank.get("choices")
    return isinstance(listed, list) and len({str(choice) for choice in listed}) > 1
