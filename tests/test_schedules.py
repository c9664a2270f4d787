"""Schedules: when groups are ready, how updates are weighed, who is drawn, what a stream does."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from conformance.cases import CASES
from conformance.setups import Setup
from conformance.world import CLIENTS
from hypothesis import given
from hypothesis import strategies as st
from loop_worlds import Slow, build, loop_of

from fedllm.adapters import Adapter
from fedllm.config import FederationConfig
from fedllm.experiment.schedules import schedule_of
from fedllm.federation import BaseServer, Update
from fedllm.seeding import rng, uniform
from fedllm.simulation import Async, Buffered, SemiSync, Sequential, Sync
from fedllm.simulation.selection import MOST_DRAWS, Selection
from fedllm.simulation.tiers import Tiers
from fedllm.system import Ideal

FEDIT = Setup(next(case for case in CASES if case.name == "fedit"))
STALENESS = ("constant", "polynomial", "hinge")


def update(cid: int, version: int = 0, rows: int = 1) -> Update:
    return Update(cid, version, Adapter({}), rows, 1)


def server_at(version: int) -> BaseServer:
    server = BaseServer()
    server.version = version
    return server


# weights


@pytest.mark.parametrize("staleness", STALENESS)
@given(a=st.floats(0.1, 20.0), b=st.integers(0, 9), late=st.integers(0, 40))
def test_an_update_counts_in_full_when_fresh_and_never_more_when_later(
    staleness: str, a: float, b: int, late: int
) -> None:
    discount = Async(staleness=staleness, a=a, b=b).discount
    assert discount(0) == 1.0
    assert 0.0 < discount(late + 1) <= discount(late)


@given(a=st.floats(0.1, 20.0), b=st.integers(0, 9), over=st.integers(1, 30))
def test_staleness_functions_are_those_of_the_paper(a: float, b: int, over: int) -> None:
    assert Async(staleness="constant").discount(over) == 1.0
    assert Async(staleness="polynomial", a=a).discount(over) == pytest.approx((1 + over) ** -a)
    hinge = Async(staleness="hinge", a=a, b=b).discount
    assert hinge(b) == 1.0
    # the published reference adds b, and is 1 / (a (d + b) + 1)
    assert hinge(b + over) == pytest.approx(1 / (a * over + 1))


def test_the_published_reference_s_hinge_is_not_ours() -> None:
    assert Async(staleness="hinge", a=1.0, b=4).discount(5) == 0.5


def test_async_mixes_with_alpha_whatever_the_rows() -> None:
    schedule = Async(alpha=0.6, a=0.5)
    schedule.begin(0)
    schedule.receive(0, update(3, version=1, rows=10**6))
    (part,) = schedule.parts(0, server_at(4))
    assert part.weight == pytest.approx(0.6 * (1 + 3) ** -0.5)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 50)), min_size=1, max_size=6))
def test_buffered_weighs_by_rows_and_discounts_what_is_late(sent: list[tuple[int, int]]) -> None:
    schedule = Buffered(size=len(sent), server_learning_rate=0.7)
    schedule.begin(0)
    for cid, (version, rows) in enumerate(sent):
        schedule.receive(0, update(cid, version, rows))
    total = sum(rows for _, rows in sent)
    wanted = [0.7 * rows / total * (1 + 5 - version) ** -0.5 for version, rows in sent]
    assert [part.weight for part in schedule.parts(0, server_at(5))] == pytest.approx(wanted)


def test_fedbuff_s_total_weight_is_eta_times_the_mean_discount() -> None:
    # algorithms.md 6.2, invariant 5: for equal clients
    schedule = Buffered(size=4, server_learning_rate=1.5)
    schedule.begin(0)
    for cid in range(4):
        schedule.receive(0, update(cid, version=cid))
    total = sum(part.weight for part in schedule.parts(0, server_at(6)))
    assert total == pytest.approx(1.5 * sum((1 + 6 - v) ** -0.5 for v in range(4)) / 4)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=5))
def test_sync_weights_sum_to_one_and_come_by_client(rows: list[int]) -> None:
    schedule = Sync(cohort_size=len(rows))
    schedule.begin(0, range(len(rows)))
    for cid in reversed(range(len(rows))):
        schedule.receive(0, update(cid, rows=rows[cid]))
    parts = schedule.parts(0, server_at(0))
    assert [part.update.cid for part in parts] == list(range(len(rows)))
    assert [part.weight for part in parts] == [count / sum(rows) for count in rows]


def test_tiers_share_the_weight_evenly_or_the_slow_ones_get_more() -> None:
    even = SemiSync(tiers=2)
    slow = SemiSync(tiers=2, is_slow_first=True)
    for schedule in (even, slow):
        schedule.made = {0: 8, 1: 1}
        for tier in (0, 1):
            schedule.begin(tier, [tier])
            schedule.receive(tier, update(tier))
    assert [even.parts(t, server_at(9))[0].weight for t in (0, 1)] == [0.5, 0.5]
    fast_weight, slow_weight = (slow.parts(t, server_at(9))[0].weight for t in (0, 1))
    assert slow_weight > fast_weight > 0
    assert fast_weight + slow_weight == pytest.approx(1.0)


# when a group is ready


def test_sync_waits_for_all_asked_but_not_for_those_that_are_lost() -> None:
    schedule = Sync(cohort_size=3)
    (order,) = schedule.orders(0)
    assert (order.group, order.size) == (0, 3)
    schedule.begin(0, [4, 5, 6])
    assert schedule.orders(3) == []
    schedule.receive(0, update(4))
    schedule.miss(0)
    assert schedule.ready is None
    schedule.receive(0, update(5))
    assert schedule.ready == 0


def test_over_selection_asks_for_more_and_takes_the_first() -> None:
    schedule = Sync(cohort_size=4, over_selection=1.3)
    assert schedule.orders(0)[0].size == 6
    schedule.begin(0, range(6))
    for cid in range(4):
        assert schedule.ready is None
        assert schedule.room(0, 9) == 4 - cid
        schedule.receive(0, update(cid))
    assert schedule.ready == 0


def test_too_few_updates_leave_the_model_as_it_is() -> None:
    schedule = Sync(cohort_size=3, min_updates=2)
    schedule.begin(0, range(3))
    schedule.receive(0, update(0))
    schedule.groups[0].is_due = True
    assert schedule.ready == 0
    assert schedule.parts(0, server_at(0)) == []


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("sync", Sync),
        ({"name": "buffered", "size": 3, "server_learning_rate": 0.5, "deadline_s": 9}, Buffered),
        ({"name": "async", "alpha": 0.9, "staleness": "hinge", "a": 10, "b": 2}, Async),
        ({"name": "semi-sync", "tiers": 4, "tier_weights": "slow-first"}, SemiSync),
        ({"name": "sequential", "reshuffle": True, "deadline_s": 5}, Sequential),
    ],
)
def test_every_setting_of_a_schedule_reaches_it(words: Any, kind: type) -> None:
    federation = FederationConfig(num_clients=9, cohort_size=7, schedule=words)
    made = schedule_of(federation)
    assert type(made) is kind
    given_ = words if isinstance(words, dict) else {}
    ours = {
        "size": "size",
        "server_learning_rate": "server_learning_rate",
        "deadline_s": "deadline_s",
        "alpha": "alpha",
        "staleness": "staleness",
        "a": "a",
        "b": "b",
        "tiers": "tiers",
        "reshuffle": "is_reshuffled",
    }
    for key, value in given_.items():
        if key in ours:
            assert getattr(made, ours[key]) == value
    assert getattr(made, "is_slow_first", True) is True
    assert kind is Sequential or made.cohort_size == 7


# who is drawn


class Half(Ideal):
    """A tenth of the clients is there, whoever the seed says; the others come later."""

    def window(self, cid: int, time_s: float) -> tuple[float, float] | None:
        open_s = 0.0 if uniform(3, "there", cid) < 0.1 else 1.0 + cid
        return open_s, math.inf


def drawn(policy: Any, count: int, *, pool: int = 10_000, free: Any = None) -> list[int]:
    selection = Selection(Half(), range(pool), policy)
    chosen = selection.choose(BaseServer(), count, 0.0, rng(5, "cohort", 0), free)
    return [cid for cid, _ in chosen]


def test_of_available_only_those_who_are_there_are_taken() -> None:
    cohort = drawn("available", 20)
    assert len(set(cohort)) == len(cohort) == 20
    assert all(Half().window(cid, 0.0)[0] == 0.0 for cid in cohort)


def test_of_any_the_first_draw_is_taken_as_it_is() -> None:
    assert drawn("any", 20) == BaseServer().sample(range(10_000), 20, rng(5, "cohort", 0))


def test_where_too_few_are_there_who_comes_next_is_waited_for() -> None:
    cohort = drawn("available", 40, pool=50)
    there = [cid for cid in range(50) if Half().window(cid, 0.0)[0] == 0.0]
    assert set(there) <= set(cohort)
    later = [cid for cid in cohort if cid not in there]
    assert len(cohort) == 40
    assert later == sorted(later)


def test_everyone_is_asked_once_and_not_drawn_again() -> None:
    assert sorted(drawn("available", 30, pool=30)) == list(range(30))


def test_who_is_at_work_is_not_drawn() -> None:
    busy = set(range(0, 10_000, 2))
    cohort = drawn("available", 20, free=lambda cid: cid not in busy)
    assert len(cohort) == 20
    assert not busy & set(cohort)


def test_once_enough_are_there_nobody_else_is_asked() -> None:
    asked = []

    class Fifth(Ideal):
        def window(self, cid: int, time_s: float) -> tuple[float, float] | None:
            asked.append(cid)
            return float(cid % 5 != 0), math.inf

    chosen = Selection(Fifth(), range(10_000)).choose(BaseServer(), 1, 0.0, rng(2, "cohort"))
    assert [cid for cid, _ in chosen] == asked[-1:]
    assert len(asked) > 1  # more than the first draw
    assert [cid % 5 == 0 for cid in asked] == [False] * (len(asked) - 1) + [True]


@dataclass
class Partly(Ideal):
    """A share of the clients is there, the others come a second later."""

    share: float

    def window(self, cid: int, time_s: float) -> tuple[float, float]:
        is_there = uniform(0, "there", cid) < self.share
        return (0.0, math.inf) if is_there else (1.0, math.inf)


class Told(Partly):
    """It is known which share."""

    @property
    def presence(self) -> float:
        return self.share


class Counting(BaseServer):
    """Remembers how many were drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[int] = []

    def sample(self, pool: Any, count: int, rng: np.random.Generator) -> Any:
        self.draws.append(count)
        return super().sample(pool, count, rng)


@pytest.mark.parametrize(("share", "most"), [(0.5, 3), (0.15, 4), (0.01, 33)])
def test_few_draws_find_a_cohort(share: float, most: int) -> None:
    """Later draws are as large as the share of those who are there asks for."""

    server = Counting()
    chosen = Selection(Partly(share), range(10**6)).choose(server, 100, 0.0, rng(1, "cohort"))
    assert len({cid for cid, _ in chosen}) == len(chosen) == 100
    assert all(open_s == 0.0 for _, (open_s, _) in chosen)
    assert len(server.draws) <= most


def test_the_first_draw_is_as_large_as_the_presence_of_clients_asks_for() -> None:
    server = Counting()
    chosen = Selection(Told(0.5), range(10**6)).choose(server, 100, 0.0, rng(1, "cohort"))
    assert len(chosen) == 100
    assert server.draws == [230]
    for count, pool in ((4, 5), (5, 5), (1, 2)):  # whoever is drawn, there are no more than wanted
        chosen = Selection(Told(0.5), range(pool)).choose(server, count, 0.0, rng(1, "cohort"))
        assert len({cid for cid, _ in chosen}) == len(chosen) == count


def test_presence_does_not_favour_anyone() -> None:
    """Each of those who are there is as likely as any other, however many are drawn."""
    world, counts = Told(0.5), Counter[int]()
    for turn in range(2000):
        selection = Selection(world, range(40))
        counts.update(cid for cid, _ in selection.choose(BaseServer(), 4, 0.0, rng(turn, "x")))
    there = [cid for cid in range(40) if world.window(cid, 0.0)[0] == 0.0]
    assert sorted(counts) == there
    expected = 2000 * 4 / len(there)
    assert all(abs(counts[cid] - expected) < 5 * math.sqrt(expected) for cid in there)


def test_the_cost_of_a_draw_is_bounded_where_nobody_will_come() -> None:
    asked = []

    class Empty(Ideal):
        def window(self, cid: int, time_s: float) -> tuple[float, float] | None:
            asked.append(cid)

    chosen = Selection(Empty(), range(10**6)).choose(BaseServer(), 10, 0.0, rng(1, "cohort"))
    assert chosen == []
    assert len(asked) <= 10 + 4 * 10 * MOST_DRAWS


def test_a_sequence_visits_everyone_once_in_a_cycle_and_passes_over_who_never_comes() -> None:
    class Some(Ideal):
        def window(self, cid: int, time_s: float) -> tuple[float, float] | None:
            return None if cid == 2 else (0.0, math.inf)

    for is_reshuffled in (False, True):
        selection, walked, visited = Selection(Some(), range(5), seed=4), 0, []
        for _ in range(8):
            walked, chosen = selection.walk(walked, 0.0, is_reshuffled)
            visited += [cid for cid, _ in chosen]
        assert Counter(visited) == dict.fromkeys((0, 1, 3, 4), 2)
        assert (visited[:4] == visited[4:]) is not is_reshuffled


@given(st.integers(2, 5), st.integers(0, 99))
def test_tiers_are_of_equal_size_and_ordered_by_pace(count: int, seed: int) -> None:
    paces = {cid: float(cid % 7) for cid in range(400)}
    tiers = Tiers.found(count, range(400), seed, paces.__getitem__)
    members = [[cid for cid in paces if tiers.of(cid) == tier] for tier in range(count)]
    assert sum(len(own) for own in members) == 400
    assert all(abs(len(own) - 400 / count) <= 2 for own in members)
    for faster, slower in itertools.pairwise(members):
        assert max(paces[cid] for cid in faster) <= min(paces[cid] for cid in slower)


# what the loop does with them


def course(schedule: Any, world: Any = None, rounds: int = 8, **options: Any) -> list[Any]:
    loop = loop_of(build(FEDIT), world=world, schedule=schedule, **options)
    return list(loop.run(rounds))


def test_a_stream_keeps_as_many_at_work_as_are_wanted() -> None:
    rounds = course(Async(cohort_size=3), Slow(open_s=100.0, pace={0: 1.0, 1: 3.0, 2: 9.0}))
    assert [made.in_flight for made in rounds[2:-1]] == [2] * 5  # the first come one by one
    assert rounds[-1].in_flight == 0
    assert rounds[-1].outcomes["unfinished"] == 2
    assert all(len(made.updates) == 1 for made in rounds)


def test_fast_clients_contribute_more_to_a_stream() -> None:
    world = Slow(open_s=100.0, pace={0: 1.0, 1: 1.0, 2: 40.0, 3: 40.0})
    counts = Counter(
        u.cid for made in course(Async(cohort_size=4), world, 30) for u in made.updates
    )
    assert min(counts[0], counts[1]) > 3 * max(counts[2], counts[3])


def test_staleness_counts_the_versions_made_in_between() -> None:
    world = Slow(open_s=100.0, pace={0: 1.0, 1: 1.0, 2: 1.0, 3: 12.0})
    rounds = course(Async(cohort_size=4), world, 30, selection="any")
    for made in rounds:
        begun = {row["client"]: row["version"] for row in made.ledger}
        arrived = [row["staleness"] for row in made.ledger if row["outcome"] == "arrived"]
        assert arrived == made.staleness
        assert made.staleness == [made.number - 1 - begun[u.cid] for u in made.updates]
    assert max(late for made in rounds for late in made.staleness) >= 3


def test_what_is_too_late_is_dropped_and_never_computed() -> None:
    world = Slow(open_s=100.0, pace={0: 1.0, 1: 1.0, 2: 1.0, 3: 12.0})
    fed = build(FEDIT)
    loop = loop_of(fed, world=world, schedule=Async(cohort_size=4, latest=2), compute="lazy")
    rounds = list(loop.run(30))
    stale = [row for made in rounds for row in made.ledger if row["outcome"] == "stale"]
    assert stale
    assert all(row["staleness"] > 2 for row in stale)
    assert all(late <= 2 for made in rounds for late in made.staleness)


def test_a_buffer_is_aggregated_when_full_or_when_its_time_is_up() -> None:
    world = Slow(open_s=100.0, pace=dict.fromkeys(CLIENTS, 10.0))
    full = course(Buffered(cohort_size=4, size=3), world)
    assert all(len(made.updates) == 3 for made in full)
    early = course(Buffered(cohort_size=4, size=3, wait_s=21.0), world)
    assert any(len(made.updates) < 3 for made in early)
    assert all(made.updates for made in early)
    deadlines = [e for made in early for e in made.events if e["event"] == "DEADLINE"]
    assert deadlines


def test_one_client_after_another_in_a_sequence() -> None:
    rounds = course(Sequential(), Slow(open_s=100.0), 8)
    visited = [made.updates[0].cid for made in rounds]
    assert sorted(visited[:4]) == sorted(visited[4:]) == list(CLIENTS)
    ends = [0.0]
    for made in rounds:
        (row,) = made.ledger
        assert row["began_s"] >= ends[-1]
        ends.append(row["ended_s"])


def test_tiers_make_updates_at_their_own_pace() -> None:
    world = Slow(open_s=100.0, pace={0: 1.0, 1: 1.0, 2: 12.0, 3: 12.0})
    rounds = course(SemiSync(cohort_size=4, tiers=2), world, 20)
    cohorts = Counter(tuple(u.cid for u in made.updates) for made in rounds)
    assert set(cohorts) == {(0, 1), (2, 3)}
    assert cohorts[0, 1] > 3 * cohorts[2, 3] > 0


def test_full_participation_in_a_buffer_is_a_round() -> None:
    # algorithms.md 6.2, invariant 2: K = C = N, one version, eta 1, no discount
    sync = loop_of(build(FEDIT), schedule=Sync(cohort_size=4))
    buffered = loop_of(build(FEDIT), schedule=Buffered(cohort_size=4, size=4))
    ours, theirs = list(buffered.run(5)), list(sync.run(5))
    assert [[u.cid for u in made.updates] for made in ours] == [list(CLIENTS)] * 5
    assert buffered.server.adapter.digest() == sync.server.adapter.digest()
    assert [made.staleness for made in theirs] == [[0] * 4] * 5


def test_async_with_one_in_flight_and_alpha_one_is_a_sequence_of_cohorts_of_one() -> None:
    class SameOrder(Async):
        """Draws as rounds do, so that both go through the same clients."""

        def stream_name(self, group: int, version: int, dispatched: int) -> tuple[str | int, ...]:
            return ("cohort", version)

    sync = loop_of(build(FEDIT), schedule=Sync(cohort_size=1))
    stream = loop_of(build(FEDIT), schedule=SameOrder(cohort_size=1, alpha=1.0))
    rounds = [list(loop.run(9)) for loop in (sync, stream)]
    assert [[u.cid for u in r.updates] for r in rounds[0]] == [
        [u.cid for u in r.updates] for r in rounds[1]
    ]
    assert sync.server.adapter.digest() == stream.server.adapter.digest()
