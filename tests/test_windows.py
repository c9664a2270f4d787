"""What comes between a client and the end of its work: windows, leaving, deadlines, time limits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from conformance.cases import CASES
from conformance.setups import Setup
from conformance.world import CLIENTS
from loop_worlds import CountingEngine, Slow, build, fate, loop_of, told

from fedllm.simulation import Async, Buffered, Loop, Sync

FEDIT = Setup(next(case for case in CASES if case.name == "fedit"))
LONG = dict.fromkeys(CLIENTS, 20.0)
"""Two steps of 20 s: they fit into a window of 60 s, hardly."""


def loop(world: Any, schedule: Any = None, **options: Any) -> Loop:
    fed = build(FEDIT, steps=options.pop("steps", 2))
    options = {"at_window_close": "discard", **options}
    return loop_of(fed, world=world, schedule=schedule or Sync(cohort_size=4), **options)


def rows(rounds: list[Any]) -> list[dict[str, Any]]:
    return [row for made in rounds for row in made.ledger]


# closing windows


def test_discarded_work_ends_with_the_window_and_changes_nothing() -> None:
    made = loop(Slow(LONG, open_s=30.0))
    before = made.server.adapter
    rounds = list(made.run(3))
    assert {row["outcome"] for row in rows(rounds)} == {"window"}
    assert all(row["ended_s"] - row["began_s"] <= 30.0 for row in rows(rounds))
    assert all(row["up_bytes"] == 0 for row in rows(rounds))
    assert all(not r.updates for r in rounds)
    assert made.server.version == 3
    assert made.server.adapter is before
    assert made.computation.executor.engine.calls == []  # nothing was trained for nothing


def test_partial_work_is_as_many_steps_as_can_be_sent_in_time() -> None:
    world = Slow(dict.fromkeys(CLIENTS, 10.0), open_s=45.0)
    rounds = list(loop(world, at_window_close="partial", steps=9).run(2))
    lost = [row["client"] for row in rows(rounds) if row["outcome"] != "arrived"]
    assert len(lost) < len(CLIENTS)  # who is sent for too late in its window
    found = [row for row in rows(rounds) if row["outcome"] == "arrived"]
    for row in found:
        window = world.window(row["client"], row["began_s"])
        left = window[1] - row["ended_s"]
        assert 0.0 <= left < 10.0  # not one more step would have fitted
        assert 1 <= row["steps"] < 9
    updates = [(u.cid, u.num_steps) for made in rounds for u in made.updates]
    assert updates == [(row["client"], row["steps"]) for row in found]


def test_partial_work_keeps_the_learning_rates_of_the_whole() -> None:
    made = loop(Slow(dict.fromkeys(CLIENTS, 10.0), open_s=45.0), at_window_close="partial", steps=9)
    next(made.run(1))
    engine = made.computation.executor.engine
    assert isinstance(engine, CountingEngine)
    assert {request.job.planned_steps for request, _ in engine.fits} == {9}


def test_what_not_one_step_fits_into_is_lost() -> None:
    rounds = list(loop(Slow(LONG, open_s=15.0), at_window_close="partial").run(2))
    assert {row["outcome"] for row in rows(rounds)} == {"window"}


def test_a_pause_goes_on_where_it_stopped_and_ends_as_if_there_had_been_none() -> None:
    short = loop(Slow(LONG, open_s=30.0), at_window_close="pause", selection="any")
    never = loop(Slow(LONG, open_s=100.0), at_window_close="pause", selection="any")
    paused, whole = list(short.run(3)), list(never.run(3))
    assert fate(short) == fate(never)
    assert {row["outcome"] for row in rows(paused)} == {"arrived"}
    for ours, theirs in zip(rows(paused), rows(whole), strict=True):
        for key in ("download_s", "train_s", "upload_s", "down_bytes", "up_bytes", "energy_j"):
            assert ours[key] == theirs[key]
        busy_s = sum(ours[key] for key in ("download_s", "train_s", "upload_s"))
        assert ours["ended_s"] - ours["began_s"] >= busy_s + 70.0
    kinds = [e["event"] for made in paused for e in made.events if e["client"] == 0]
    assert kinds[:3] == ["WINDOW_OPEN", "WINDOW_CLOSE", "WINDOW_OPEN"]


def test_a_client_inside_a_window_when_a_round_starts_is_used_at_once() -> None:
    # the published reference waits for the next opening
    rounds = list(loop(Slow(open_s=99.0), selection="any").run(4))
    for before, made in itertools.pairwise(rounds):
        begun = {row["client"]: row["began_s"] for row in made.ledger}
        for cid, began_s in begun.items():
            open_s, _ = Slow(open_s=99.0).window(cid, before.time_s)
            assert began_s == max(open_s, before.time_s)


def test_what_is_done_when_the_window_closes_is_done_in_time() -> None:
    (made,) = loop(Slow(open_s=99.0), Sync(cohort_size=1), selection="any").run(1)
    (row,) = made.ledger
    busy_s = row["download_s"] + row["train_s"] + row["upload_s"]
    exact = Slow(open_s=busy_s, absent=frozenset(CLIENTS) - {0})
    (whole,) = loop(exact, Sync(cohort_size=4), selection="any").run(1)
    assert whole.outcomes == {"arrived": 1}
    short = Slow(open_s=math.nextafter(busy_s, 0.0), absent=frozenset(CLIENTS) - {0})
    (cut,) = loop(short, Sync(cohort_size=4), selection="any").run(1)
    assert cut.outcomes == {"window": 1}


# leaving


def test_who_leaves_is_lost_and_costs_what_it_did() -> None:
    world = Slow(open_s=100.0, pace=dict.fromkeys(CLIENTS, 5.0), leaves={1: 6.0})
    rounds = list(loop(world).run(2))
    lost = [row for row in rows(rounds) if row["outcome"] == "dropout"]
    assert [row["client"] for row in lost] == [1, 1]
    for row in lost:
        assert row["ended_s"] - row["began_s"] == pytest.approx(6.0)
        assert row["download_s"] + row["train_s"] == pytest.approx(6.0)
        assert row["up_bytes"] == 0
        assert 0.0 < row["energy_j"] < 5.0 * 6.0 + 1.0
    assert all([u.cid for u in made.updates] == [0, 2, 3] for made in rounds)


def test_who_leaves_in_the_download_does_not_hold_the_model() -> None:
    rolora = Setup(next(case for case in CASES if case.name == "rolora" and not case.settings))
    world = Slow(open_s=100.0, leaves={1: 0.001})
    made = loop_of(build(rolora), world=world, schedule=Sync(cohort_size=4))
    rounds = list(made.run(2))
    assert 1 not in made.server.contacts
    first, second = (next(row for row in r.ledger if row["client"] == 1) for r in rounds)
    assert (
        0
        <= first["down_bytes"]
        < next(r for r in rounds[0].ledger if r["client"] == 0)["down_bytes"]
    )
    assert second["outcome"] == "dropout"


def test_paused_work_counts_no_time_towards_leaving() -> None:
    world = Slow(LONG, open_s=30.0, leaves={0: 35.0})
    rounds = list(loop(world, at_window_close="pause", selection="any").run(1))
    (row,) = [row for row in rows(rounds) if row["client"] == 0]
    assert row["outcome"] == "dropout"
    assert row["download_s"] + row["train_s"] == pytest.approx(35.0)
    assert row["ended_s"] == pytest.approx(105.0)


# deadlines


def test_a_deadline_ends_a_round_with_what_has_arrived() -> None:
    world = Slow(open_s=100.0, pace={0: 1.0, 1: 1.0, 2: 1.0, 3: 40.0})
    made = loop(world, Sync(cohort_size=4, wait_s=30.0))
    rounds = list(made.run(3))
    assert all([u.cid for u in r.updates] == [0, 1, 2] for r in rounds)
    assert all(r.outcomes == {"arrived": 3, "deadline": 1} for r in rounds)
    assert rounds[0].time_s == 30.0
    trained = {cid for call in made.computation.executor.engine.calls for cid, _ in call}
    assert trained == {0, 1, 2}  # who cannot be in time is not computed


def test_a_deadline_that_nobody_meets_moves_on_and_says_so() -> None:
    made = loop(Slow(LONG, open_s=100.0), Sync(cohort_size=4, wait_s=5.0))
    rounds = list(made.run(4))
    assert [r.time_s for r in rounds] == [5.0, 10.0, 15.0, 20.0]
    assert all(not r.updates and r.agg_error is None for r in rounds)
    assert made.server.version == 4


def test_what_arrives_at_the_deadline_is_in_time() -> None:
    world = Slow(open_s=100.0)
    (first,) = loop(world, selection="any").run(1)
    (again,) = loop(world, Sync(cohort_size=4, wait_s=first.time_s), selection="any").run(1)
    assert [u.cid for u in again.updates] == [u.cid for u in first.updates]
    early = math.nextafter(first.time_s, 0.0)
    (less,) = loop(world, Sync(cohort_size=4, wait_s=early), selection="any").run(1)
    assert len(less.updates) < len(first.updates)


def test_the_surplus_of_an_over_selection_is_sent_home_and_not_computed() -> None:
    world = Slow(open_s=100.0, pace={0: 10.0, 1: 10.0, 2: 20.0, 3: 30.0})
    made = loop(world, Sync(cohort_size=2, over_selection=2.0), selection="any")
    rounds = list(made.run(1))
    assert rounds[0].outcomes == {"arrived": 2, "surplus": 2}
    assert len(made.computation.executor.engine.calls) == 1
    assert len(made.computation.executor.engine.calls[0]) == 2
    cancelled = [e for e in rounds[0].events if e["event"] == "CANCELLED"]
    assert all(e["time_s"] == rounds[0].time_s and e["state"] == "idle" for e in cancelled)


# the end


@pytest.mark.parametrize("schedule", [Sync(cohort_size=2), Async(cohort_size=2), Buffered()])
def test_a_population_that_never_wakes_ends_the_run_with_a_record(schedule: Any) -> None:
    made = loop(Slow(absent=frozenset(CLIENTS)), schedule)
    (last,) = made.run(5)
    assert last.is_last
    assert "ever be available" in last.ended
    assert (last.updates, last.number, last.time_s) == ([], 1, 0.0)
    assert list(made.run(5)) == []


def test_who_never_comes_does_not_hold_up_the_others() -> None:
    rounds = list(loop(Slow(absent=frozenset({2})), selection="any").run(3))
    assert all([u.cid for u in made.updates] == [0, 1, 3] for made in rounds)


def test_a_time_limit_ends_the_run_at_its_instant() -> None:
    made = loop(Slow(open_s=100.0), time_limit_s=20.5)
    rounds = list(made.run(1000))
    assert rounds[-1].ended == "the time limit of 20.5 s is reached"
    assert rounds[-1].time_s == 20.5
    assert all(r.time_s <= 20.5 for r in rounds)
    assert [r.is_last for r in rounds] == [False] * (len(rounds) - 1) + [True]


def test_a_stream_in_which_everything_is_lost_ends() -> None:
    made = loop(Slow(LONG, open_s=30.0), Async(cohort_size=2))
    (last,) = made.run(5)
    assert "jobs in a row were lost" in last.ended
    assert last.outcomes["window"] >= 1000


# cells


def test_a_shared_cell_slows_transfers_that_go_on_at_once() -> None:
    pace = {cid: 15.0 - 3.5 * cid for cid in CLIENTS}  # all begin to send at about 30 s
    alone = Slow(pace, open_s=100.0)
    shared = Slow(pace, open_s=100.0, cells=dict.fromkeys(CLIENTS, 1))
    first, second = (
        {row["client"]: row for row in rows(list(loop(world, selection="any").run(1)))}
        for world in (alone, shared)
    )
    assert second[0]["download_s"] == first[0]["download_s"]  # it was the first
    assert all(second[cid]["download_s"] == first[cid]["download_s"] for cid in CLIENTS)
    slower = sorted(second[cid]["upload_s"] / first[cid]["upload_s"] for cid in CLIENTS)
    assert slower == pytest.approx([1.0, 2.0, 3.0, 4.0])


def test_energy_is_that_of_the_seconds_worked() -> None:
    for row in rows(list(loop(Slow(LONG, open_s=45.0, leaves={3: 9.0})).run(2))):
        wanted = 5.0 * row["train_s"] + row["download_s"] + 2.0 * row["upload_s"]
        assert row["energy_j"] == pytest.approx(wanted)


def test_computing_early_or_for_nothing_changes_nothing() -> None:
    world = Slow({0: 1.0, 1: 20.0, 2: 9.0, 3: 33.0}, leaves={2: 11.0})
    found = []
    for options in ({}, {"compute": "eager"}, {"lost": "compute"}):
        made = loop(world, Buffered(cohort_size=3, size=2), **options)
        found.append((told(list(made.run(6))), fate(made)))
    assert found[1] == found[0]
    assert found[2] == found[0]
