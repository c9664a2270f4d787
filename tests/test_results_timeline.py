"""Timelines: what clients did, read from events and ledger, against counting by hand."""

from __future__ import annotations

import doctest
import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from results_worlds import Work, course

from fedllm.results import compare, spans, time_plots, timeline
from fedllm.results.spans import mean_count, merged
from fedllm.results.time_plots import bars, cost_unit, thinned, working_shares
from fedllm.results.timeline import OUTCOMES, Timeline

SPANS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 20)).map(lambda s: (s[0], s[0] + s[1]))
)


@pytest.mark.parametrize("module", [timeline, spans, compare])
def test_the_examples_in_the_documentation_hold(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


# spans


@given(SPANS)
def test_merged_spans_cover_the_same_seconds_once(found: list[tuple[int, int]]) -> None:
    joined = merged(found)
    covered = {second for low, high in found for second in range(low, high)}
    assert sum(high - low for low, high in joined) == len(covered)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(joined))


@given(SPANS, st.integers(1, 7))
def test_the_mean_count_is_that_of_counting_each_part(
    found: list[tuple[int, int]], steps: int
) -> None:
    end, width = 60.0, 60.0 / steps
    counted = mean_count(found, end, steps)
    for step, count in enumerate(counted):
        left, right = step * width, (step + 1) * width
        overlap = sum(max(min(high, right) - max(low, left), 0.0) for low, high in found)
        assert count == pytest.approx(overlap / width, abs=1e-9)
    assert sum(counted) * width == pytest.approx(sum(high - low for low, high in found))


# jobs


def test_a_job_that_goes_on_is_shown_up_to_now() -> None:
    found = course([Work(0, 0.0, 9.0, 5.0), Work(1, 0.0, 3.0, 99.0, outcome="")])
    going = [(s.phase, s.start_s, s.end_s) for s in found.segments([1])]
    assert going == [("training", 0.0, 4.0), ("uploading", 4.0, 15.0)]
    assert {s.outcome for s in found.segments([1])} == {"under way"}


def test_work_and_windows_are_counted_in_every_part_of_the_time() -> None:
    # client 0 is there for 20 s and works for 10; client 1 works for all of its 5 s
    jobs = [
        Work(0, 0.0, 5.0, 4.0, until_s=20.0),
        Work(1, 0.0, 3.0, 1.0, until_s=5.0),
        Work(2, 19.0, 0.0, 0.0, outcome="window", until_s=20.0),
    ]
    found = course(jobs)
    assert found.end_s == 20.0
    times, training, uploading = found.at_work(4)
    assert times == [2.5, 7.5, 12.5, 17.5]
    assert training == pytest.approx([9 / 5, 1 / 5, 0, 1 / 5])
    assert uploading == pytest.approx([1 / 5, 4 / 5, 0, 0])
    assert found.online(4) == pytest.approx([2, 1, 1, 1 + 1 / 5])
    assert found.working_share() == pytest.approx(16 / 26)
    assert working_shares(found, 4) == pytest.approx([1.0, 1.0, 0.0, (1 / 5) / (6 / 5)])


def test_where_nobody_is_known_to_be_there_no_share_is_told() -> None:
    jobs = [Work(0, 0.0, 3.0, 1.0, until_s=5.0), Work(0, 15.0, 3.0, 1.0, until_s=20.0)]
    shares = working_shares(course(jobs), 4)
    assert [math.isnan(share) for share in shares] == [False, True, True, False]


def test_a_client_sent_for_twice_in_one_window_has_one_window() -> None:
    jobs = [Work(3, 0.0, 1.0, 1.0, until_s=30.0), Work(3, 5.0, 1.0, 23.0, until_s=30.0)]
    assert course(jobs).windows() == {3: [(0.0, 30.0)]}


def test_a_window_without_an_end_ends_with_the_run() -> None:
    assert course([Work(3, 2.0, 1.0, 1.0)]).windows([3]) == {3: [(2.0, 5.0)]}


def test_only_updates_that_were_used_are_counted_as_late() -> None:
    jobs = [
        Work(0, 0.0, 1.0, 1.0, staleness=0),
        Work(1, 0.0, 1.0, 1.0, staleness=2),
        Work(2, 0.0, 1.0, 1.0, staleness=2),
        Work(3, 0.0, 1.0, 1.0, "stale", staleness=9),
        Work(4, 0.0, 1.0, 1.0, "dropout"),
    ]
    assert course(jobs).staleness == {0: 1, 2: 2}


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(list(OUTCOMES)))), st.integers(0, 9))
def test_every_job_and_every_client_is_counted_once(
    drawn: list[tuple[int, str]], num_clients: int
) -> None:
    found = course([Work(c, 0.0, 1.0, 1.0, o) for c, o in drawn]).participation(num_clients)
    assert sum(found.jobs) == len(drawn)
    assert sum(found.used) == sum(outcome == "arrived" for _, outcome in drawn)
    assert list(found.used) == sorted(found.used, reverse=True)
    seen, helped = {c for c, _ in drawn}, {c for c, o in drawn if o == "arrived"}
    assert found.never_seen == max(num_clients - len(seen), 0)
    assert found.never_used - found.never_seen == len(seen) - len(helped)
    assert 0.0 <= found.gini < 1.0


# excerpts


def test_of_many_clients_the_busiest_are_shown_and_that_is_said() -> None:
    jobs = [Work(c, 10.0 * n, 1.0, 1.0) for c in range(6) for n in range(c + 1)]
    shown = course(jobs).excerpt(2, 99)
    assert shown.clients == [4, 5]
    assert shown.told == "the 2 busiest of 6 clients"
    assert {s.client for s in shown.segments} == set(shown.windows) == {4, 5}


def test_all_there_is_is_shown_without_a_word() -> None:
    found = course([Work(0, 0.0, 1.0, 1.0), Work(1, 5.0, 1.0, 1.0)])
    shown = found.excerpt(40, 99)
    assert shown.told == "2 clients"
    assert shown.until_s == found.end_s
    assert len(shown.segments) == 4


def test_of_a_long_time_the_beginning_is_shown_and_that_is_said() -> None:
    ends = ("dropout", "arrived")
    jobs = [Work(0, 10.0 * n, 3.0, 1.0, ends[n % 2], until_s=1e9) for n in range(100)]
    found = course(jobs)
    shown = found.excerpt(40, 10)
    assert shown.until_s == 50.0
    assert len(shown.segments) == 10
    assert max(s.end_s for s in shown.segments) <= shown.until_s
    assert shown.windows == {0: [(0.0, 50.0)]}
    assert [row["job"] for row in shown.lost] == [1, 3, 5]
    assert shown.told == "1 client, the first 5% of the time"


def test_a_stretch_that_goes_on_beyond_the_excerpt_is_cut() -> None:
    jobs = [Work(1, 0.0, 98.0, 1.0)] + [Work(0, 10.0 * n, 3.0, 1.0) for n in range(9)]
    shown = course(jobs).excerpt(40, 5)
    assert {s.end_s for s in shown.segments if s.client == 1} == {shown.until_s}


def test_stretches_are_sorted_by_what_came_of_them() -> None:
    jobs = [Work(c, 0.0, 1.0, 1.0, staleness=late) for c, late in enumerate((0, 1, 2, 3, 4, 70))]
    jobs += [Work(9, 0.0, 1.0, 1.0, "dropout"), Work(8, 0.0, 1.0, 1.0, outcome="")]
    found = {kind.label: sorted(s.client for s in kind.segments) for kind in bars(
        course(jobs).segments())}  # fmt: skip
    assert found == {
        "training": [0, 1, 2, 3, 4, 5],
        "uploading": [0],
        "sent, 1 version late": [1],
        "sent, 2 or 3 late": [2, 3],
        "sent, more late": [4, 5],
        "training, lost": [9],
        "uploading, lost": [9],
        "training, under way": [8],
        "uploading, under way": [8],
    }


def test_every_way_to_be_lost_has_a_mark() -> None:
    assert set(time_plots.LOSS_MARKS) == set(OUTCOMES) - {"arrived"}


@given(st.lists(st.floats(0, 100)).map(sorted), st.integers(1, 9))
def test_no_more_times_are_left_than_asked_for(times_s: list[float], most: int) -> None:
    left, step = thinned(times_s, 50.0, most)
    within = [time_s for time_s in times_s if time_s <= 50.0]
    assert len(left) <= most
    assert left == within[::step]


# figures


def test_the_timeline_says_what_is_lost_and_draws_every_version() -> None:
    jobs = [Work(0, 0.0, 3.0, 1.0), Work(1, 0.0, 3.0, 1.0, "deadline"), Work(2, 0.0, 1.0, 1.0, "")]
    figure = time_plots.timeline(course(jobs, [2.0, 4.0]))
    assert figure is not None
    legend: Any = figure.axes[0].get_legend()
    told = {text.get_text() for text in legend.get_texts()}
    assert {"window", "lost: deadline", "new version", "training, lost"} <= told
    lines: Any = figure.axes[0].get_lines()
    assert [line.get_xdata()[0] for line in lines] == [2.0, 4.0]
    assert figure.axes[0].get_title(loc="left") == "Timeline of 2 clients"


def test_participation_tells_of_those_never_seen() -> None:
    figure = time_plots.participation(course([Work(0, 0.0, 3.0, 1.0)]), 10)
    assert figure is not None
    title = figure.axes[0].get_title(loc="left")
    assert title == "9 of 10 clients never seen, 9 never used, Gini 0.90"


@pytest.mark.parametrize("draw", [time_plots.timeline, time_plots.utilisation,
                                  time_plots.staleness])  # fmt: skip
def test_without_time_nothing_is_drawn(draw: Any) -> None:
    assert draw(Timeline([], [])) is None
    assert time_plots.participation(Timeline([], []), 5) is None


@pytest.mark.parametrize(
    ("key", "end", "told"),
    [
        ("virtual_time_s", 7200.0 * 3, (3600.0, "virtual hours")),
        ("energy_total_j", 2000.0, (1.0, "energy of clients (J)")),
        ("energy_total_j", 9000.0, (1e3, "energy of clients (kJ)")),
    ],
)
def test_costs_have_a_unit_that_fits(key: str, end: float, told: tuple[float, str]) -> None:
    assert cost_unit(key, end) == told
