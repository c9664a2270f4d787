"""Parquet files of traces: the fast way in gives what the slow one gives, or gives way to it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import ConfigError
from fedllm.system.traces import Record, WindowTrace, generate, own_format, read_record
from fedllm.system.traces.columns import fast_trace
from fedllm.system.traces.own_format import write_record

SPAN = 40.0
edge = st.integers(0, 80).map(lambda half: half / 2)
spans = st.tuples(edge, edge).filter(lambda pair: pair[0] < pair[1])
clients = st.dictionaries(
    st.sampled_from(["a", "b", "c", "ä"]), st.lists(spans, min_size=1, max_size=5), min_size=1
)


def fast(path: Path) -> WindowTrace | None:
    return fast_trace(path, lambda header: own_format._head(path, header))


def shuffled(path: Path) -> None:
    """Put the rows of a file in another order, and in several row groups."""
    table = parquet.read_table(path)
    order = list(range(len(table)))
    random.Random(3).shuffle(order)
    parquet.write_table(table.take(order), path, row_group_size=2)


@given(
    windows=clients,
    wraps=st.booleans(),
    unknown=st.sampled_from(["wrap", "unavailable", "available"]),
    cover=st.booleans(),
    times=st.lists(st.floats(0, 200), min_size=1, max_size=5),
)
def test_columns_give_what_rows_give(
    tmp_path_factory: pytest.TempPathFactory,
    windows: dict[str, list[tuple[float, float]]],
    wraps: bool,
    unknown: Any,
    cover: bool,
    times: list[float],
) -> None:
    path = tmp_path_factory.mktemp("columns") / "trace.parquet"
    record = Record(SPAN, wraps, windows=windows, unknown=unknown)
    if cover:
        lows = {name: min(low for low, _ in own) for name, own in windows.items()}
        record.coverage = {name: (low, SPAN) for name, low in lows.items()}
    record.capacities["z"] = {"flops_per_s": 1.0}
    write_record(record, path)
    shuffled(path)
    trace, slow = WindowTrace.load(path), read_record(path)[0].trace()
    assert trace.names == slow.names
    for index in range(trace.num_clients):
        for time_s in times:
            assert trace.window(index, time_s) == slow.window(index, time_s)


@pytest.mark.parametrize("wraps", [True, False])
@pytest.mark.parametrize("unknown", ["wrap", "unavailable"])
@pytest.mark.parametrize("in_order", [True, False])
def test_windows_that_are_apart_are_read_without_a_row_as_an_object(
    tmp_path: Path, wraps: bool, unknown: Any, in_order: bool
) -> None:
    path = tmp_path / "trace.parquet"
    record = generate(30, 3, "random", seed=5)
    record.wraps, record.unknown = wraps, unknown
    for name, own in list(record.windows.items())[::2]:
        record.coverage[name] = own[0][0], own[-1][1]
    write_record(record, path)
    if not in_order:
        shuffled(path)
    trace, slow = fast(path), read_record(path)[0].trace()
    assert trace is not None
    assert trace.names == slow.names
    assert trace.opens.dtype == np.int32
    for name in ("opens", "closes", "offsets", "starts", "periods"):
        assert np.array_equal(getattr(trace, name), getattr(slow, name)), name


def test_a_window_outside_of_its_client_s_coverage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    write_record(Record(SPAN, windows={"a": [(0.0, 1.0)]}, coverage={"a": (0.5, 9.0)}), path)
    with pytest.raises(ConfigError, match=r"client a: 0\.0 to 1\.0 s is not in its coverage"):
        WindowTrace.load(path)


@pytest.mark.parametrize(
    "windows", [[(0.0, 2.0), (1.0, 3.0)], [(0.0, 2.0), (2.0, 3.0)], [(0.0, 9.0), (1.0, 2.0)]]
)
def test_windows_that_are_one_are_left_to_the_slow_way(
    tmp_path: Path, windows: list[tuple[float, float]]
) -> None:
    path = tmp_path / "trace.parquet"
    write_record(Record(SPAN, windows={"a": windows}), path)
    assert fast(path) is None
    assert WindowTrace.load(path).num_windows == 1


ROW = {"client": "a", "kind": "window", "t0_s": 0.0, "t1_s": 1.0}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"client": None}, "client must be text"),
        ({"kind": None}, "kind None is none of"),
        ({"kind": "windw"}, "kind 'windw' is none of"),
        ({"t1_s": None}, "needs t0_s and t1_s"),
        ({"t1_s": 0.0}, "t0_s before t1_s"),
        ({"t0_s": -1.0}, "0 or more"),
        ({"t1_s": 99.0}, "beyond the header's span_s"),
        ({"t1_s": "soon"}, "0 or more, not 'soon'"),
    ],
)
def test_a_row_that_is_wrong_is_told_by_its_number(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    path = tmp_path / "trace.parquet"
    write_record(Record(SPAN), path)
    table = arrow.Table.from_pylist([ROW | change])
    parquet.write_table(table.replace_schema_metadata(parquet.read_schema(path).metadata), path)
    with pytest.raises(ConfigError) as caught:
        WindowTrace.load(path)
    assert f"{path}:1: " in str(caught.value)
    assert told in str(caught.value)


def test_a_parquet_file_that_is_not_ours_says_how_it_becomes_so(tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    parquet.write_table(arrow.Table.from_pylist([ROW]), path)
    with pytest.raises(ConfigError, match="fedllm trace import"):
        WindowTrace.load(path)
    path.write_text("nonsense")
    with pytest.raises(ConfigError, match="is not a Parquet file"):
        WindowTrace.load(path)
