"""The event queue and the one loop: order, virtual time, and equality with a plain loop."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence
from itertools import groupby

import pytest
from conformance.cases import CASES
from conformance.setups import Setup, each_head, each_setup
from conformance.world import Federation, run_jobs
from hypothesis import given
from hypothesis import strategies as st
from loop_worlds import PERIOD_S, CountingEngine, Slow, build, fate, loop_of

from fedllm.federation import BaseServer, HeadPolicy, Part
from fedllm.seeding import rng
from fedllm.simulation import ClientState, Event, EventKind, EventQueue, Population
from fedllm.simulation.events import Entry
from fedllm.simulation.record import Lines
from fedllm.system import Ideal, Work

SETUPS = [Setup(case) for case in CASES]
each_algorithm = pytest.mark.parametrize("setup", SETUPS, ids=str)

times = st.sampled_from([0.0, 0.5, 1.0, 1.0 + 1e-12, 7.0])
pushes = st.tuples(times, st.sampled_from(EventKind), st.integers(0, 3))


@given(st.lists(pushes))
def test_events_come_by_time_then_kind_then_order_of_pushing(pushed: list) -> None:
    queue = EventQueue()
    for push in pushed:
        queue.push(*push)
    popped = [Event(*queue.pop()) for _ in pushed]
    order = sorted(range(len(pushed)), key=lambda i: (pushed[i][0], pushed[i][1], i))
    assert [event.number for event in popped] == order
    assert [(e.time_s, e.kind, e.cid) for e in popped] == [pushed[i] for i in order]
    assert len(queue) == 0


@given(st.lists(st.one_of(st.none(), st.tuples(times, st.sampled_from(EventKind)))))
def test_time_never_runs_back_however_pushes_and_pops_mix(acts: list) -> None:
    queue, seen = EventQueue(), [0.0]
    for act in acts:
        if act is not None:
            queue.push(queue.now_s + act[0], act[1], 0)
        elif len(queue):
            assert queue.pending[0][0] == queue.pop()[0] == queue.now_s
            seen.append(queue.now_s)
    assert seen == sorted(seen)


def test_an_event_in_the_past_is_refused_and_one_at_the_present_is_not() -> None:
    queue = EventQueue()
    queue.push(2.0, EventKind.WINDOW_OPEN, 0)
    queue.pop()
    queue.push(2.0, EventKind.WINDOW_OPEN, 1)
    with pytest.raises(ValueError, match=r"client 2 .* before the present"):
        queue.push(math.nextafter(2.0, 0.0), EventKind.WINDOW_OPEN, 2)
    assert len(queue) == 1


def test_at_one_instant_what_is_done_counts_before_what_ends_it() -> None:
    order = ["WINDOW_OPEN", "TRAINING_DONE", "UPLOAD_DONE", "DROPOUT", "WINDOW_CLOSE", "DEADLINE"]
    assert [kind.name for kind in sorted(EventKind)] == order


@given(st.lists(pushes, min_size=1), st.data(), st.lists(pushes))
def test_a_restored_queue_goes_on_as_the_original(
    first: list, data: st.DataObject, later: list
) -> None:
    queue = EventQueue()
    for push in first:
        queue.push(*push)
    for _ in range(data.draw(st.integers(0, len(first)))):
        queue.pop()
    copy = EventQueue(queue.now_s, queue.snapshot())
    for time_s, kind, cid in later:
        for each in (queue, copy):
            each.push(each.now_s + time_s, kind, cid)
    ours, theirs = ([each.pop() for _ in range(len(each))] for each in (queue, copy))
    assert [event[:2] + event[3:] for event in ours] == [event[:2] + event[3:] for event in theirs]
    assert copy.now_s == queue.now_s


# the ideal world is a plain loop


def plain_loop(fed: Federation, rounds: int, cohort_size: int) -> list[list[dict[str, int]]]:
    """Train and aggregate round after round, as one would write it by hand; return the ledger."""
    ledger = []
    for _ in range(rounds):
        jobs = fed.jobs(fed.sampled(cohort_size))
        updates = sorted(run_jobs(jobs, fed.client, fed.engine), key=lambda u: u.cid)
        down = {job.cid: job.payload.nbytes for job in jobs}
        number = fed.server.version + 1
        ledger.append(
            [
                {
                    "round": number,
                    "client": u.cid,
                    "down_bytes": down[u.cid],
                    "up_bytes": u.nbytes,
                }
                for u in updates
            ]
        )
        for update in updates:
            fed.store.put(update.cid, update.state)
        total = sum(fed.server.weight(u) for u in updates)
        fed.server.apply([Part(fed.server.weight(u) / total, u) for u in updates])
    return ledger


@each_setup
@each_head
@pytest.mark.parametrize("cohort_size", [4, 2])
def test_the_ideal_world_is_a_plain_loop_over_rounds(
    setup: Setup, head: HeadPolicy, cohort_size: int
) -> None:
    by_hand = build(setup, head=head)
    ledger = plain_loop(by_hand, 4, cohort_size)
    fed = build(setup, head=head)
    loop = loop_of(fed, cohort_size)
    rounds = list(loop.run(4))
    told = [[{key: row[key] for key in ledger[0][0]} for row in r.ledger] for r in rounds]
    assert told == ledger
    assert fate(loop) == fate(loop_of(by_hand))
    assert all(r.time_s == 0.0 for r in rounds)


@each_algorithm
def test_a_whole_cohort_trains_together_in_the_ideal_world(setup: Setup) -> None:
    fed = build(setup)
    cohorts = [{update.cid for update in made.updates} for made in loop_of(fed, 3).run(3)]
    engine = fed.engine
    assert isinstance(engine, CountingEngine)
    calls = [{cid for cid, _ in call} for call in engine.calls]
    # an algorithm may train several times in a round, the whole cohort each time
    assert [own for own, _ in groupby(calls)] == [own for own, _ in groupby(cohorts)]


@each_setup
@each_head
def test_uploads_are_known_before_training(setup: Setup, head: HeadPolicy) -> None:
    fed = build(setup, head=head)
    loop = loop_of(fed, 3)
    for made in loop.run(3):
        wanted = {update.cid: update.nbytes for update in made.updates}
        assert {row["client"]: row["up_bytes"] for row in made.ledger} == wanted


# other worlds


@each_algorithm
@pytest.mark.parametrize("cohort_size", [4, 2])
def test_neither_time_nor_the_order_of_arrival_changes_a_result(
    setup: Setup, cohort_size: int
) -> None:
    fates = []
    paces = ({}, {0: 9.0}, {0: 9.0, 1: 5.0, 2: 2.0}, {3: 400.0})
    for world in (Ideal(), *(Slow(pace) for pace in paces)):
        loop = loop_of(build(setup), cohort_size, world)
        list(loop.run(4))
        fates.append(fate(loop))
    assert all(other == fates[0] for other in fates[1:])


def after(world: Slow, cid: int, now: float, left_s: float) -> float:
    """Return when so many seconds of work are done that go on in every window."""
    open_s, close_s = world.window(cid, now)
    now = max(now, open_s)
    while now + left_s > close_s:
        left_s -= close_s - now
        now, close_s = world.window(cid, close_s)
    return now + left_s


@each_algorithm
def test_virtual_times_follow_from_bytes_steps_and_windows(setup: Setup) -> None:
    world = Slow({0: 30.0, 1: 20.0})
    fed = build(setup)
    loop, now = loop_of(fed, 3, world), 0.0
    for made in loop.run(4):
        ends = []
        for row in made.ledger:
            cid = row["client"]
            open_s = max(world.window(cid, now)[0], now)
            received_s = world.download_s(cid, row["down_bytes"], open_s, 1)
            busy_s = received_s + world.fit_s(cid, Work(2, 1.0, 1.0, 1))
            trained = after(world, cid, open_s, busy_s)
            upload_s = world.upload_s(cid, row["up_bytes"], trained, 1)
            # nothing to send is sent even at the instant at which a window closes
            ends.append(after(world, cid, trained, upload_s) if upload_s else trained)
            own = [(e["time_s"], e["event"]) for e in made.events if e["client"] == cid]
            assert own[0] == (open_s, "WINDOW_OPEN")
            assert (trained, "TRAINING_DONE") in own
            assert own[-1] == (ends[-1], "UPLOAD_DONE")
            assert row["began_s"] == open_s
            assert row["ended_s"] == ends[-1]
            assert (row["download_s"], row["upload_s"]) == (received_s, upload_s)
        now = max(ends)
        assert made.time_s == now
    assert now > PERIOD_S


def test_lines_are_read_as_mappings() -> None:
    lines = Lines(("a", "b"), [(1, 2), (3, 4, "c", 5)])
    assert list(lines) == [{"a": 1, "b": 2}, {"a": 3, "b": 4, "c": 5}]
    assert (lines[-1], lines[:1], len(lines)) == ({"a": 3, "b": 4, "c": 5}, [{"a": 1, "b": 2}], 2)
    assert lines.column("b") == [2, 4]


class WatchedQueue(EventQueue):
    """Remembers what each client is doing between events."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = None
        self.seen: list[tuple[Event, dict[int, ClientState]]] = []

    def pop(self) -> Entry:
        entry = super().pop()
        flights = self.loop.fleet.flights
        self.seen.append((Event(*entry), {cid: flight.state for cid, flight in flights.items()}))
        return entry


@each_algorithm
def test_every_client_goes_from_idle_through_training_and_upload_to_idle(setup: Setup) -> None:
    queue = WatchedQueue()
    loop = loop_of(build(setup), 3, Slow({1: 20.0}), queue)
    queue.loop = loop
    rounds = list(loop.run(3))
    before = {
        EventKind.WINDOW_OPEN: ClientState.IDLE,
        EventKind.TRAINING_DONE: ClientState.TRAINING,
        EventKind.UPLOAD_DONE: ClientState.UPLOADING,
    }
    for event, states in queue.seen:
        if event.kind in before:
            assert states.get(event.cid, ClientState.IDLE) is before[event.kind]
    for made in rounds:
        assert len({row["client"] for row in made.ledger}) == len(made.ledger)
        for cid in (update.cid for update in made.updates):
            path = [(e["event"], e["state"]) for e in made.events if e["client"] == cid]
            assert path[0] == ("WINDOW_OPEN", "available")
            assert ("TRAINING_DONE", "uploading") in path
            assert path[-1] == ("UPLOAD_DONE", "idle")
        assert made.events[-1]["event"] == "AGGREGATED"
    told_times = [e["time_s"] for made in rounds for e in made.events]
    assert told_times == sorted(told_times)
    assert loop.fleet.flights == {}
    assert loop.answered == {}
    assert loop.computation.results == {}


# populations


class CountingPool(Sequence):
    """Ids 0 to n - 1, made when asked for; walking through them all is an error."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        self.asked += 1
        return range(self.count)[index]

    def __iter__(self):
        raise AssertionError("a cohort costs as much as the population")


@given(st.integers(0, 2**32), st.integers(1, 64))
def test_sampling_is_without_replacement_and_looks_at_the_cohort_alone(
    seed: int, count: int
) -> None:
    pool = CountingPool(10**6)
    cohort = BaseServer().sample(pool, count, rng(seed, "cohort", 0))
    assert len(set(cohort)) == len(cohort) == count == pool.asked
    assert all(type(cid) is int and 0 <= cid < 10**6 for cid in cohort)


def test_a_cohort_of_a_million_clients_allocates_for_the_cohort_alone() -> None:
    pool = Population([5] * 10**6).pool()
    stream = rng(0, "cohort", 0)
    BaseServer().sample(pool, 10, stream)
    tracemalloc.start()
    BaseServer().sample(pool, 10, stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(pool, range)
    assert peak < 20_000


def test_a_cohort_is_never_larger_than_the_pool() -> None:
    assert sorted(BaseServer().sample(range(3), 9, rng(0))) == [0, 1, 2]


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(0, 99))
def test_a_client_without_rows_is_never_sampled(sizes: list[int], seed: int) -> None:
    pool = Population(sizes).pool()
    assert list(pool) == [cid for cid, size in enumerate(sizes) if size]
    cohort = BaseServer().sample(pool, 30, rng(seed)) if len(pool) else []
    assert sorted(cohort) == list(pool)
