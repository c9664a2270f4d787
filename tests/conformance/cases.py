"""The table: one row for each algorithm. A new algorithm adds a row here and no test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedllm.federation import MixedRank


@dataclass(frozen=True)
class Trip:
    """One client's part in one round: all that the closed forms of the byte counts depend on."""

    shapes: tuple[tuple[int, int], ...]
    """(out, in) of every adapted module."""
    rank: int
    """The client's rank."""
    version: int
    """Server version it downloads."""
    since: int
    """Server version it downloaded last; -1 at first contact."""
    stacks: tuple[int, ...]
    """Sum of ranks of the cohort whose updates made version 1, 2, ..., `version`."""
    largest: int = 0
    """The largest rank of any client."""
    mixed: bool = False
    """Whether clients have unequal ranks."""

    @property
    def outs(self) -> int:
        """Sum of o over modules."""
        return sum(o for o, _ in self.shapes)

    @property
    def ins(self) -> int:
        """Sum of i over modules."""
        return sum(i for _, i in self.shapes)

    @property
    def made(self) -> range:
        """The versions made since the last contact."""
        return range(max(self.since, 0) + 1, self.version + 1)


Elements = Callable[[Trip], int]
"""How many numbers travel, heads not counted."""


def both(trip: Trip) -> int:
    """A and B of every module."""
    return trip.rank * (trip.outs + trip.ins)


def only_a(trip: Trip) -> int:
    """A of every module."""
    return trip.rank * trip.ins


def only_b(trip: Trip) -> int:
    """B of every module."""
    return trip.rank * trip.outs


def alternating(trip: Trip) -> int:
    """B in the rounds that make odd versions, A in the others."""
    return only_b(trip) if trip.version % 2 == 0 else only_a(trip)


def changed_halves(trip: Trip) -> int:
    """The halves updated since the last contact; both at first contact."""
    first = trip.since < 0
    has_b = first or any(version % 2 == 1 for version in trip.made)
    has_a = first or any(version % 2 == 0 for version in trip.made)
    return has_b * only_b(trip) + has_a * only_a(trip)


def nothing(trip: Trip) -> int:
    """Nothing travels."""
    return 0


def always(trip: Trip) -> int:
    """One of it, every time."""
    return 1


def before(end: int, elements: Elements) -> Elements:
    """Send only from versions before `end`, as when the last rounds are local."""
    return lambda trip: elements(trip) if trip.version < end else 0


def once_after(end: int, elements: Elements) -> Elements:
    """Receive what rests from version `end` on once more at most."""
    return lambda trip: elements(trip) if trip.since < end else 0


EXPERTS = 2


def expert_and_router(trip: Trip) -> int:
    """One expert, and a router with an output for each expert and M - 1 more."""
    return both(trip) + (2 * EXPERTS - 1) * trip.ins


def all_experts(trip: Trip) -> int:
    """All experts, and one router."""
    return EXPERTS * both(trip) + (2 * EXPERTS - 1) * trip.ins


def alone_then(end: int, elements: Elements) -> Elements:
    """Send nothing, then once the adapter trained alone, then `elements`."""
    return lambda trip: (
        elements(trip) if trip.version >= end else both(trip) * (trip.version == end - 1)
    )


def tiers(root: int, cluster: int) -> Elements:
    """Receive the tier that is trained, and each that is done once."""
    return lambda trip: (
        both(trip) * ((trip.since < root) + (root <= trip.version and trip.since < cluster))
    )


def missed_stacks(trip: Trip) -> int:
    """The increments made since the last contact, or the whole sum where that is smaller."""
    missed = sum(trip.stacks[v - 1] for v in trip.made) * (trip.outs + trip.ins)
    whole = sum(min(sum(trip.stacks) * (o + i), o * i) for o, i in trip.shapes)
    return min(missed, whole)


@dataclass(frozen=True)
class Case:
    """What an algorithm promises."""

    name: str
    up: Elements
    """Closed form of the numbers a client sends."""
    down: Elements
    """Closed form of the numbers a client receives."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False
    """The global view after a round is the base plus sum_k p_k s_k B_k A_k (equal ranks)."""
    personal: bool = False
    """Clients keep tensors that make a view of their own."""
    mixed_rank: MixedRank = "unsupported"
    shares_head: bool = True
    """Whether a head travels under the policy `shared`."""
    uses_svd: bool = False
    """Factors come out of an SVD: fp32 then agrees to 1e-4 only."""
    exempt: frozenset[str] = frozenset()
    """Invariants that the specification does not ask of it (`zero-step mixed`, ...)."""
    heads_up: Elements = always
    """How many heads a client sends, where heads travel at all."""
    heads_down: Elements = always
    """How many heads a client receives."""
    opening: int = 0
    """Rounds with everyone that come first, where that is part of the algorithm."""
    own_download: bool = False
    """What a client receives is meant for it, or for its cluster."""
    sends_private: bool = False
    """What is kept is sent as well."""
    own_weights: bool = False
    """Clients weigh by something that the method finds out."""
    reworks_frozen: bool = False
    """The server changes what clients hold frozen."""

    def is_exempt(self, invariant: str, *, mixed: bool = False) -> bool:
        """Tell whether an invariant is not asked of it, or not where ranks are unequal."""
        return invariant in self.exempt or (mixed and f"{invariant} mixed" in self.exempt)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.settings.items())])


def merged_since(trip: Trip, ranks: Sequence[Sequence[int]]) -> int:
    """What was merged since the last contact, or the whole sum where that is smaller.

    `ranks` holds the rank of each increment (version 1 first), module by module.
    """
    sides = [o + i for o, i in trip.shapes]
    missed = sum(r * d for v in trip.made for r, d in zip(ranks[v - 1], sides, strict=True))
    totals = [sum(own) for own in zip(*ranks, strict=True)] if ranks else [0] * len(sides)
    whole = [min(r * d, o * i) for r, d, (o, i) in zip(totals, sides, trip.shapes, strict=True)]
    return min(missed, sum(whole))


def with_residuals(trip: Trip) -> int:
    """A and B, and residuals of rank (K - 1) r; of stack and mean where ranks are unequal."""
    ranks = [
        [s + trip.largest if trip.mixed else s - trip.rank] * len(trip.shapes) for s in trip.stacks
    ]
    return both(trip) + merged_since(trip, ranks)


def with_tails(trip: Trip) -> int:
    """A and B, and whatever rank of the stack is beyond the adapter's."""
    ranks = [[max(0, min(s, *shape) - trip.largest) for shape in trip.shapes] for s in trip.stacks]
    return both(trip) + merged_since(trip, ranks)


def cores(heads: int) -> Elements:
    """A square matrix of each head of every module."""
    return lambda trip: heads * trip.rank**2 * len(trip.shapes)


def values(density: float) -> Elements:
    """A share of every weight's entries."""
    return lambda trip: sum(max(1, round(density * o * i)) for o, i in trip.shapes)


def stages(end: int, first: Elements, then: Elements) -> Elements:
    """One thing in the rounds before version `end`, another from it on."""
    return lambda trip: first(trip) if trip.version < end else then(trip)


def twice(elements: Elements) -> Elements:
    """The same once more, for control variates."""
    return lambda trip: 2 * elements(trip)


def two(trip: Trip) -> int:
    """One of it, and a control variate of its size."""
    return 2


SERVER_STEPS = frozenset(
    {"zero-step", "one client", "identical clients", "head mean", "unsent component"}
)
"""What does not hold where the server takes a step of its own along the mean change."""

CASES = [
    Case("fedit", up=both, down=both),
    Case("ffa-lora", up=only_b, down=only_b, exact=True, mixed_rank="padded"),
    Case(
        "fedsa-lora",
        up=only_a,
        down=only_a,
        personal=True,
        mixed_rank="padded",
        shares_head=False,
    ),
    Case("rolora", up=alternating, down=changed_halves, exact=True, mixed_rank="padded"),
    Case(
        "flexlora",
        up=both,
        down=both,
        mixed_rank="projected",
        uses_svd=True,
        # a client of small rank gets a truncated adapter, so zero steps still change the mean
        exempt=frozenset({"zero-step mixed"}),
    ),
    Case("flora", up=both, down=missed_stacks, exact=True, mixed_rank="exact"),
    Case(
        "fedex-lora",
        up=both,
        down=with_residuals,
        exact=True,
        mixed_rank="padded",
        # the residual is right for the whole pair, of which a small client holds a part
        exempt=frozenset(
            {"zero-step mixed", "one client mixed", "identical clients mixed", "unsent component"}
        ),
    ),
    Case(
        "fedsvd",
        up=only_b,
        down=both,
        exact=True,
        mixed_rank="projected",
        uses_svd=True,
        reworks_frozen=True,
        # columns that a small client does not own are refactored with its own
        exempt=frozenset({"zero-step mixed", "one client mixed", "identical clients mixed"}),
    ),
    Case("ravan", settings={"heads": 3}, up=cores(3), down=cores(3), exact=True),
    Case("ravan", settings={"heads": 3, "trained_heads": 2}, up=cores(2), down=cores(3)),
    Case("ravan", settings={"heads": 2, "bases": "gaussian"}, up=cores(2), down=cores(2)),
    Case(
        "slora",
        settings={"sparse_rounds": 100, "density": 0.1},
        up=values(0.1),
        down=values(0.1),
        mixed_rank="projected",
        exact=True,
    ),
    Case(
        "slora",
        settings={"sparse_rounds": 2, "density": 0.1},
        up=stages(2, values(0.1), both),
        down=stages(2, values(0.1), both),
        mixed_rank="projected",
        uses_svd=True,
        opening=2,
    ),
    Case(
        "ilora",
        up=twice(both),
        down=twice(both),
        heads_up=two,
        heads_down=two,
        mixed_rank="projected",
        uses_svd=True,
        exempt=frozenset({"zero-step mixed"}),
    ),
    Case("fedrot-lora", up=both, down=both, mixed_rank="padded"),
    Case(
        "fedmomentum",
        settings={"energy": 1.0},
        up=both,
        down=with_tails,
        exact=True,
        uses_svd=True,
        mixed_rank="projected",
        exempt=frozenset({"zero-step mixed"}),
    ),
    Case(
        "hetlora",
        settings={"gamma": 1.0},
        up=both,
        down=both,
        mixed_rank="padded",
        own_weights=True,
        # a row that a client lacks counts as zeros
        exempt=frozenset({"zero-step mixed"}),
    ),
    Case("lora-fair", up=both, down=both),
    Case("cyclic", up=both, down=both),
    Case("fedprox", up=both, down=both),
    Case("scaffold", up=twice(both), down=twice(both), heads_up=two, heads_down=two),
    Case("fedavgm", up=both, down=both, exempt=SERVER_STEPS),
    Case("fedadagrad", up=both, down=both, exempt=SERVER_STEPS),
    Case("fedadam", up=both, down=both, exempt=SERVER_STEPS),
    Case("fedyogi", up=both, down=both, exempt=SERVER_STEPS),
    Case(
        "rolora",
        settings={"optimizer": "fedadam"},
        up=alternating,
        down=changed_halves,
        mixed_rank="padded",
        exempt=SERVER_STEPS,
    ),
    Case(
        "ffa-lora",
        settings={"optimizer": "scaffold"},
        up=twice(only_b),
        down=twice(only_b),
        heads_up=two,
        heads_down=two,
        mixed_rank="padded",
        exact=True,
    ),
    Case(
        "fedsa-lora",
        settings={"optimizer": "fedprox"},
        up=only_a,
        down=only_a,
        personal=True,
        mixed_rank="padded",
        shares_head=False,
    ),
    Case(
        "ravan",
        settings={"heads": 2, "optimizer": "fedavgm"},
        up=cores(2),
        down=cores(2),
        exempt=SERVER_STEPS,
    ),
    Case(
        "rolora",
        settings={"optimizer": "scaffold"},
        up=twice(alternating),
        down=lambda trip: changed_halves(trip) + both(trip),  # c of both halves
        heads_up=two,
        heads_down=two,
        mixed_rank="padded",
        exact=True,
    ),
    Case(
        "ravan",
        settings={"heads": 3, "trained_heads": 2, "optimizer": "scaffold"},
        up=twice(cores(2)),
        down=twice(cores(3)),
        heads_up=two,
        heads_down=two,
    ),
    Case(
        "ditto",
        settings={"optimizer": "scaffold"},
        up=twice(both),
        down=twice(both),
        heads_up=two,
        heads_down=two,
        personal=True,
    ),
    Case(
        "fine-tune",
        settings={"tune_rounds": 3, "optimizer": "scaffold"},
        up=before(3, twice(both)),
        down=stages(3, twice(both), once_after(3, both)),  # no c where all tune
        heads_up=before(3, two),
        heads_down=stages(3, two, once_after(3, always)),
        personal=True,
    ),
    Case(
        "ditto",
        settings={"optimizer": "fedyogi"},
        up=both,
        down=both,
        personal=True,
        exempt=SERVER_STEPS,
    ),
    Case(
        "local-only", up=nothing, down=nothing, personal=True, mixed_rank="exact", shares_head=False
    ),
    Case(
        "fine-tune",
        settings={"tune_rounds": 3},  # of the six that the suite's server is told of
        up=before(3, both),
        down=once_after(3, both),
        heads_up=before(3, always),
        heads_down=once_after(3, always),
        personal=True,
    ),
    Case("ditto", up=both, down=both, personal=True),
    Case(
        "feddpa-f",
        settings={"personal_rounds": 3},
        up=before(3, both),
        down=once_after(3, both),
        heads_up=before(3, always),
        heads_down=once_after(3, always),
        personal=True,
    ),
    Case("feddpa-t", up=both, down=both, personal=True),
    Case("pfedlora", up=both, down=both, personal=True),
    Case("pfedlora", settings={"order": "global-first"}, up=both, down=both, personal=True),
    Case(
        "fedlease",
        settings={"warmup_rounds": 2, "clusters": EXPERTS, "weights": "samples"},
        up=alone_then(2, expert_and_router),
        down=lambda trip: all_experts(trip) if trip.version >= 2 else 0,
        heads_up=lambda trip: trip.version >= 1,
        heads_down=lambda trip: trip.version >= 2,
        personal=True,
        opening=2,
        own_download=True,
    ),
    Case(
        "hilora",
        settings={"root_rounds": 2, "cluster_rounds": 2},
        up=before(4, both),
        down=tiers(2, 4),
        heads_up=before(4, always),
        heads_down=once_after(4, always),
        personal=True,
        mixed_rank="projected",
        uses_svd=True,
        exempt=frozenset({"zero-step mixed"}),
        opening=2,
        own_download=True,
    ),
    Case(
        "hilora",
        settings={"root_rounds": 100},
        up=both,
        down=both,
        personal=True,
        mixed_rank="projected",
        uses_svd=True,
        exempt=frozenset({"zero-step mixed"}),
    ),
    Case(
        "fedalt",
        settings={"weights": "samples"},
        up=both,
        down=both,
        personal=True,
        # the rest of the world of identical clients is their own adapter, not what it was
        exempt=frozenset({"identical clients"}),
        own_download=True,
        sends_private=True,
    ),
]
