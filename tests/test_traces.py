"""Traces: windows against brute force, importers, the generator, and what must be refused."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import ConfigError, DataError
from fedllm.system.traces import Record, WindowTrace, generate, import_trace, read_record, write_as
from fedllm.system.traces.own_format import write_record
from fedllm.system.traces.window_trace import Unknown, merge

SPAN = 40
edges = st.lists(st.tuples(st.integers(0, SPAN), st.integers(0, SPAN)), max_size=5)
windows = edges.map(lambda pairs: [(float(min(p)), float(max(p))) for p in pairs])


def there(own: Sequence[tuple[float, float]], time_s: float) -> bool:
    return any(low <= time_s < high for low, high in own)


def first_after(is_there: Any, time_s: float, horizon: float) -> tuple[float, float] | None:
    """Walk half-seconds from long before a time: edges lie on whole seconds."""
    step, now = 0.5, float(math.floor(time_s) - 3 * SPAN)
    opened = None
    while now < horizon:
        if is_there(now):
            opened = now if opened is None else opened
        else:
            if opened is not None and now > time_s:
                return float(opened), float(now)
            opened = None
        now += step
    return None if opened is None else (float(opened), math.inf)


@given(windows, st.floats(0, 3 * SPAN), st.booleans())
def test_windows_are_those_of_brute_force(
    own: list[tuple[float, float]], time_s: float, wraps: bool
) -> None:
    trace = WindowTrace.of({"a": own}, float(SPAN), wraps=wraps)

    def is_there(at: float) -> bool:
        return there(own, at % SPAN if wraps else at)

    assert trace.is_available(0, time_s) == is_there(time_s)
    found = trace.window(0, time_s)
    wanted = first_after(is_there, time_s, time_s + 4 * SPAN)
    if wanted is None:
        assert found is None
    elif wanted[1] == math.inf:
        assert found is not None
        assert found[0] <= time_s
        assert found[1] == math.inf
    else:
        assert found is not None
        assert found == pytest.approx(wanted)


@given(windows, st.integers(0, 10), st.integers(1, 30), st.floats(0, 200))
def test_a_client_s_own_coverage_comes_again(
    own: list[tuple[float, float]], low: int, length: int, time_s: float
) -> None:
    high = min(low + length, SPAN)
    kept = [(max(a, low), min(b, high)) for a, b in own]
    trace = WindowTrace.of({"a": kept}, float(SPAN), coverage={"a": (float(low), float(high))})
    within = low + (time_s - low) % (high - low)
    assert trace.is_available(0, time_s) == there(kept, within)


@given(windows, st.integers(0, 10), st.integers(15, 30), st.floats(0, SPAN - 0.01))
def test_what_is_unknown_is_what_one_says(
    own: list[tuple[float, float]], low: int, high: int, time_s: float
) -> None:
    kept = merge([(max(a, low), min(b, high)) for a, b in own])
    coverage = {"a": (float(low), float(high))}
    is_known = low <= time_s < high
    unknown: Unknown
    for unknown, outside in (("unavailable", False), ("available", True)):
        trace = WindowTrace.of({"a": own}, float(SPAN), coverage=coverage, unknown=unknown)
        wanted = there(kept, time_s) if is_known else outside
        assert trace.is_available(0, time_s) == wanted


@pytest.mark.parametrize(
    ("time_s", "wanted"), [(2.0, (-5.0, 3.0)), (36.0, (35.0, 43.0)), (41.0, (35.0, 43.0))]
)
def test_a_window_at_the_end_and_one_at_the_beginning_are_one(
    time_s: float, wanted: tuple[float, float]
) -> None:
    own = [(0.0, 3.0), (10.0, 12.0), (35.0, 40.0)]
    trace = WindowTrace.of({"a": own}, 40.0)
    assert trace.window(0, time_s) == wanted
    assert trace.window(0, time_s + 4000.0) == (wanted[0] + 4000.0, wanted[1] + 4000.0)
    assert WindowTrace.of({"a": own}, 40.0, wraps=False).window(0, 36.0) == (35.0, 40.0)


@pytest.mark.parametrize("edge", [0.5, 2.0**31, 1e300])
def test_seconds_that_take_more_than_four_bytes_are_kept_as_they_are(edge: float) -> None:
    trace = WindowTrace.of({"a": [(0.25, edge)]}, 2 * edge)
    assert trace.listed(0) == [(0.25, edge)]


def test_beyond_a_trace_that_does_not_come_again_nothing_is_known() -> None:
    unknown: Unknown
    for unknown, wanted in (("unavailable", False), ("available", True)):
        trace = WindowTrace.of({"a": [(1.0, 2.0)]}, 5.0, wraps=False, unknown=unknown)
        assert trace.is_available(0, 99.0) == wanted


@given(st.floats(1e-3, 1e6), st.floats(0, 1), st.integers(0, 10**6))
def test_a_window_ends_after_the_time_that_is_asked_for_however_it_is_rounded(
    period: float, part: float, turn: int
) -> None:
    # asked at its very end: the same window again would stop virtual time
    trace = WindowTrace.of({"a": [(0.0, part * period)]}, period)
    for _ in range(3):
        time_s = turn * period + part * period
        found = trace.window(0, time_s)
        assert found is None or found[1] > time_s
        turn += 1


@given(st.lists(windows, min_size=1, max_size=4), st.floats(0, 3 * SPAN), st.booleans())
def test_the_share_that_is_there_is_counted_client_by_client(
    clients: list[list[tuple[float, float]]], time_s: float, wraps: bool
) -> None:
    named = {str(place): own for place, own in enumerate(clients)}
    cover = {"0": (4.0, 30.0)}
    trace = WindowTrace.of(named, float(SPAN), wraps=wraps, coverage=cover)
    wanted = sum(trace.is_available(index, time_s) for index in range(len(clients)))
    assert trace.share_available([time_s]) == [wanted / len(clients)]


@pytest.mark.parametrize(
    ("opens", "closes"), [([0, 5], [5, 9]), ([0, 7], [8, 9]), ([3, 5], [3, 9]), ([0, 5], [2, 11])]
)
def test_arrays_that_are_not_in_order_are_refused(opens: list[int], closes: list[int]) -> None:
    with pytest.raises(DataError, match="must open before it closes"):
        WindowTrace.from_arrays(np.array(opens), np.array(closes), np.array([0, 2]), 10.0)
    two = np.array([0, 1, 2])
    if opens != [3, 5] and closes[1] <= 10:  # of two clients they are
        assert (
            WindowTrace.from_arrays(np.array(opens), np.array(closes), two, 10.0).num_windows == 2
        )


@given(windows)
def test_asking_again_gives_the_same_and_changes_nothing(own: list[tuple[float, float]]) -> None:
    # FedScale's is_active moves one window with each call
    trace = WindowTrace.of({"a": own}, float(SPAN))
    times = [random.Random(4).uniform(0, 99) for _ in range(9)]
    first = [trace.window(0, time_s) for time_s in times]
    assert [trace.window(0, time_s) for time_s in reversed(times)][::-1] == first


@given(
    st.lists(windows, min_size=1, max_size=4),
    st.one_of(st.floats(0, 3 * SPAN), st.integers(0, 3 * SPAN).map(float)),
    st.booleans(),
    st.sampled_from([None, (4.0, 30.0), (5.0, 5.0)]),
    st.sampled_from(["wrap", "available", "unavailable"]),
)
def test_clients_asked_together_are_answered_as_one_by_one(
    clients: list[list[tuple[float, float]]],
    time_s: float,
    wraps: bool,
    cover: tuple[float, float] | None,
    unknown: Unknown,
) -> None:
    named = {str(place): own for place, own in enumerate(clients)}
    coverage = {"0": cover} if cover else {}
    trace = WindowTrace.of(named, float(SPAN), wraps=wraps, coverage=coverage, unknown=unknown)
    for asked in (list(range(len(clients))), list(range(len(clients))) * 40):
        alone = [trace.window(index, time_s) for index in asked]
        assert list(trace.windows(asked, time_s)) == alone


def test_many_windows_asked_together() -> None:
    stream = np.random.default_rng(0)
    own = {
        str(cid): [(float(t), t + 0.5) for t in np.unique(stream.integers(0, 999, size=cid))]
        for cid in range(150)
    }
    trace, asked = WindowTrace.of(own, 1000.0), list(range(150))
    for time_s in (0.0, 0.5, 400.25, 999.0, 1_500_400.25):
        alone = [trace.window(index, time_s) for index in asked]
        assert list(trace.windows(asked, time_s)) == alone


def test_fedscale_s_example_asked_three_times() -> None:
    own = [(0.0, 100.0), (200.0, 300.0), (400.0, 500.0), (600.0, 700.0)]
    trace = WindowTrace.of({"a": own}, 800.0)
    assert [trace.is_available(0, 650.0) for _ in range(3)] == [True] * 3


def test_a_client_without_windows_is_never_there() -> None:
    # the published reference raises TypeError here
    trace = WindowTrace.of({"a": [], "b": [(1.0, 2.0)]}, 10.0)
    assert trace.window(0, 3.0) is None
    assert trace.window(1, 3.0) == (11.0, 12.0)


def test_flat_arrays_hold_many_clients_in_little_memory() -> None:
    count = 20_000
    opens = np.tile(np.arange(20, dtype=np.int32) * 100, count)
    trace = WindowTrace.from_arrays(
        opens, opens + 50, np.arange(count + 1, dtype=np.int64) * 20, 2000.0
    )
    assert trace.num_clients == count
    assert trace.window(count - 1, 2010.0) == (2000.0, 2050.0)
    assert not trace.is_available(7, 75.0)
    arrays = (trace.opens, trace.closes, trace.offsets, trace.starts, trace.periods)
    assert sum(array.nbytes for array in arrays) / count < 185


# FedScale


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("bad", [Evil(), {1: Evil()}, {1: np.float64(3)}, {1: range(3)}])
def test_a_pickle_that_asks_for_code_is_refused(
    tmp_path: Path, bad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "trace.pkl"
    path.write_bytes(pickle.dumps(bad))
    with pytest.raises(DataError, match="could run code"):
        import_trace(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x04K", b"nonsense"])
def test_a_torn_pickle_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "trace.pkl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"trace\.pkl"):
        import_trace(path)


def test_fedscale_s_windows_come_again_after_each_client_s_own_time(tmp_path: Path) -> None:
    path = tmp_path / "behave.pkl"
    rows = {
        3: {"active": [0, 50], "inactive": [10, 60], "finish_time": 100, "duration": 100},
        4: {"active": [5], "inactive": [], "finish_time": 20, "duration": 20},
        5: {"active": [5, 6, 7], "inactive": [], "finish_time": 20},
        6: {"active": [5], "inactive": [math.nan], "finish_time": 20},
    }
    path.write_bytes(pickle.dumps(rows))
    record, problems = import_trace(path, malformed=0.5)
    assert problems.named == [
        f"{path}:client 5: needs a positive finish_time, and an inactive for each active",
        f"{path}:client 6: times must be finite",
    ]
    trace = record.trace()
    assert trace.names == ["3", "4"]
    assert trace.window(0, 155.0) == (150.0, 160.0)
    assert trace.window(1, 41.0) == (45.0, 60.0)


def test_fedscale_s_capacities_become_relative_speeds(tmp_path: Path) -> None:
    path = tmp_path / "capacity.pkl"
    rows = {i: {"computation": 100.0 * (i + 1), "communication": 2000.0} for i in range(3)}
    path.write_bytes(pickle.dumps(rows))
    record, _ = import_trace(path)
    speeds = [values["relative_speed"] for values in record.capacities.values()]
    assert speeds == pytest.approx([2.0, 1.0, 2 / 3])
    assert record.links["1"] == {"up_bps": 2e6, "down_bps": 2e6}


# Plato, and our own


@pytest.mark.parametrize("times", ["nan", "5, inf", "9, 5", "-1"])
def test_transitions_must_be_seconds_in_order(tmp_path: Path, times: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"a: on, [5]\nb: on, [{times}]\n")
    with pytest.raises(DataError, match=r"a\.txt:2: transitions must be seconds in ascending"):
        import_trace(path)


def test_transitions_are_read_from_text_and_json(tmp_path: Path) -> None:
    text, table = tmp_path / "a.txt", tmp_path / "a.json"
    text.write_text("# clients\na: on, [54, 890, 2042]\nb: off, [10, 20]\nc off\n")
    table.write_text(json.dumps({"a": ["on", [54, 890, 2042]], "b": ["off", [10, 20]], "c": 1}))
    for path in (text, table):
        record, problems = import_trace(path, "plato", malformed=0.5)
        assert record.windows == {"a": [(0.0, 54.0), (890.0, 2042.0)], "b": [(10.0, 20.0)]}
        assert problems.count == 1
        assert record.span_s == 2042.0


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_our_own_format_comes_back_as_it_was(tmp_path: Path, suffix: str) -> None:
    record, path = generate(6, 2, seed=4), tmp_path / f"trace{suffix}"
    record.unknown = "available"
    record.capacities["client-1"] = {"flops_per_s": 2e12}
    write_record(record, path)
    again, problems = read_record(path)
    assert problems.count == 0
    assert again == record
    assert record.origin == "2020-01-06T00:00:00+00:00"
    with pytest.raises(DataError, match="nothing is overwritten"):
        write_record(record, path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not a JSON object"),
        ('{"client": "a", "kind": "pause"}', "kind 'pause' is none of"),
        ('{"client": "a", "kind": "window", "t0_s": 5, "t1_s": 5}', "t0_s before t1_s"),
        ('{"client": "a", "kind": "window", "t0_s": -1, "t1_s": 5}', "0 or more"),
        ('{"client": "a", "kind": "window", "t0_s": 1, "t1_s": 11}', "beyond the header's span_s"),
        ('{"client": "a", "kind": "window", "t0_s": 1, "t1_s": 1e999}', "0 or more"),
        (f'{{"client": "a", "kind": "link", "up_bps": 1{"0" * 400}}}', "0 or more"),
        ("[" * 10**5, "not a JSON object"),
        ('{"client": null, "kind": "link", "up_bps": 5}', "client must be"),
        ('{"client": "a", "kind": "capacity"}', "needs at least one of"),
    ],
)
def test_a_line_of_ours_that_is_wrong_is_told_by_its_number(
    tmp_path: Path, line: str, told: str
) -> None:
    path = tmp_path / "trace.jsonl"
    write_record(Record(10.0, windows={"a": [(0.0, 1.0)]}), path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError) as caught:
        WindowTrace.load(path)
    assert f"{path}:3: " in str(caught.value)
    assert told in str(caught.value)


def test_a_window_outside_of_its_client_s_coverage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_record(Record(10.0, windows={"a": [(0.0, 1.0)]}, coverage={"a": (0.5, 9.0)}), path)
    _, problems = read_record(path)
    assert problems.named == [f"{path}:client a: 0.0 to 1.0 s is not in its coverage, 0.5 to 9.0"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"span_s": None}, "span_s must be"),
        ({"span_s": True}, "span_s must be"),
        ({"span_s": 0}, "span_s must be"),
        ({"wraps": "false"}, "wraps must be true or false"),
        ({"unknown": "sometimes"}, "must be one of unavailable, available, wrap"),
        ({"version": 2}, "is of version 2"),
    ],
)
def test_a_header_that_is_wrong_is_told(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({"format": "fedllm-trace", "version": 1, "span_s": 5} | change))
    with pytest.raises(ConfigError, match=told):
        WindowTrace.load(path)


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other"}', "hello\n"])
def test_a_file_that_is_not_ours_says_how_it_becomes_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="fedllm trace import"):
        WindowTrace.load(path)


# made up


@pytest.mark.parametrize("behaviour", ["overnight", "office", "random"])
@pytest.mark.parametrize("kind", ["ours", "flash", "fedscale", "plato"])
def test_what_is_made_up_comes_back_from_every_format(
    tmp_path: Path, kind: Any, behaviour: Any
) -> None:
    record = generate(12, 3, behaviour, seed=2)
    path = tmp_path / f"trace.{'jsonl' if kind == 'ours' else kind}"
    write_as(record, kind, path)
    again, problems = import_trace(path)
    assert problems.count == 0
    assert list(again.windows.values()) == list(record.windows.values())
    before, after = record.trace(), again.trace()
    stream = random.Random(1)
    for _ in range(300):
        client, time_s = stream.randrange(12), stream.uniform(0, 3 * 86400 - 1)
        assert after.is_available(client, time_s) == before.is_available(client, time_s)


def test_made_up_traces_follow_from_the_seed() -> None:
    assert generate(5, 2, seed=1).windows == generate(5, 2, seed=1).windows
    assert generate(5, 2, seed=1).windows != generate(5, 2, seed=2).windows


def test_office_hours_are_by_day_and_on_working_days() -> None:
    trace = generate(50, 7, "office", seed=3).trace()
    day = 86400.0
    assert trace.share_available([12 * 3600.0])[0] > 0.8
    assert trace.share_available([3 * 3600.0, 5 * day + 12 * 3600.0]) == [0.0, 0.0]
