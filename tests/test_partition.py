from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.config import PartitionConfig
from fedllm.data import PARTITIONS, Message, Row, Rows, heterogeneity, partition
from fedllm.data.partitions import fill_up
from fedllm.errors import DataError

WORDS = ("apple pear plum fruit", "car bus train road", "rain snow wind storm", "piano violin drum")


def a_row(i: int, groups: int, clients: int) -> Row:
    kind = i * 7919 % groups
    text = f"{WORDS[kind % len(WORDS)]} {i} " + "x" * (i * 31 % 50)
    messages = (Message("user", text), Message("assistant", "ok"))
    return Row(messages, None, None, f"g{kind}", f"owner{i * 31 % clients}", f"row {i}")


def some_rows(train: int, test: int, *, groups: int = 4, clients: int = 30) -> Rows:
    def split(first: int, count: int) -> tuple[Row, ...]:
        return tuple(a_row(i, groups, clients) for i in range(first, first + count))

    return Rows(split(0, train), split(train, test), "qa", (), "made up")


RULES = list(PARTITIONS)
CHEAP = [name for name in RULES if name != "topic"]


def test_the_table_lists_what_the_configuration_allows() -> None:
    allowed = get_args(PartitionConfig.model_fields["name"].annotation)
    assert set(RULES) == set(allowed)
    for name in RULES:
        assert callable(PARTITIONS.load(name))


@settings(deadline=None)
@given(
    name=st.sampled_from(CHEAP),
    train=st.integers(60, 200),
    test=st.integers(0, 60),
    clients=st.integers(1, 30),
    groups=st.integers(1, 6),
    alpha=st.sampled_from([0.001, 0.1, 1.0, 1000.0]),
    min_rows=st.integers(0, 2),
    seed=st.integers(0, 3),
)
def test_every_row_has_one_owner_and_every_client_enough(
    name: Any,
    train: int,
    test: int,
    clients: int,
    groups: int,
    alpha: float,
    min_rows: int,
    seed: int,
) -> None:
    rows = some_rows(train, test, groups=groups)
    config = PartitionConfig(name=name, alpha=alpha, min_rows=min_rows, shards_per_client=6)
    made = partition(config, rows, clients, seed)
    assert made.num_clients == clients
    assert np.array_equal(np.sort(made.train_rows), np.arange(train))
    assert np.array_equal(np.sort(made.test_rows), np.arange(test))
    assert made.train_sizes.min() >= min_rows
    assert made.train_sizes.sum() == train
    together = [row for cid in range(clients) for row in made.train(cid).tolist()]
    assert sorted(together) == list(range(train))


@pytest.mark.parametrize("name", RULES)
def test_a_partition_follows_from_its_seed(name: Any) -> None:
    rows = some_rows(300, 60)
    config = PartitionConfig(name=name, topics=4)
    one, same, other = (partition(config, rows, 6, seed) for seed in (1, 1, 2))
    for field in ("train_rows", "train_offsets", "test_rows", "test_offsets"):
        assert np.array_equal(getattr(one, field), getattr(same, field))
    if name not in ("length", "column"):
        assert not np.array_equal(one.train_rows, other.train_rows)


@pytest.mark.parametrize("name", ["dirichlet", "shards", "topic", "quantity"])
def test_test_rows_follow_the_proportions_of_train_rows(name: Any) -> None:
    rows = some_rows(4000, 4000)
    config = PartitionConfig(name=name, alpha=0.3, topics=4)
    made = partition(config, rows, 6, seed=0)
    groups = [row.group or "" for row in rows.train]
    table = heterogeneity(made, groups).counts / 4000
    for cid in range(6):
        mine = [rows.test[i].group for i in made.test(cid)]
        share = np.array([mine.count(f"g{g}") for g in range(4)]) / 4000
        assert np.abs(share - table[cid]).max() < 0.02


def test_iid_sizes_differ_by_one_at_most() -> None:
    made = partition(PartitionConfig(), some_rows(1003, 50), 10, seed=0)
    assert set(made.train_sizes.tolist()) == {100, 101}


def test_a_small_alpha_makes_clients_unlike() -> None:
    rows = some_rows(2000, 0)
    groups = [row.group or "" for row in rows.train]
    far, near = (
        heterogeneity(partition(PartitionConfig(name="dirichlet", alpha=a), rows, 8, 0), groups)
        for a in (0.05, 100.0)
    )
    assert far.mean_distance > 0.4 > 0.1 > near.mean_distance


def test_shards_give_each_client_few_groups() -> None:
    rows = some_rows(2000, 200, groups=6)
    config = PartitionConfig(name="shards", shards_per_client=2)
    made = partition(config, rows, 12, seed=0)
    report = heterogeneity(made, [row.group or "" for row in rows.train])
    assert (report.counts > 0).sum(1).max() <= 2
    assert report.train_sizes.max() < 1.5 * report.train_sizes.min()
    with pytest.raises(DataError, match="make 4 shards, too few for 6 groups"):
        partition(config, rows, 2, seed=0)


def test_owners_stay_together() -> None:
    rows = some_rows(500, 100, clients=30)
    made = partition(PartitionConfig(name="column"), rows, 10, seed=0)
    owners = [{rows.train[i].client for i in made.train(cid)} for cid in range(10)]
    tested = [{rows.test[i].client for i in made.test(cid)} for cid in range(10)]
    assert sum(map(len, owners)) == 30
    assert all(test <= train for test, train in zip(tested, owners, strict=True))
    with pytest.raises(DataError, match="30 different owners, fewer than the 31 clients"):
        partition(PartitionConfig(name="column"), rows, 31, seed=0)


def test_length_sorts_clients_from_short_to_long() -> None:
    rows = some_rows(600, 300)
    made = partition(PartitionConfig(name="length"), rows, 5, seed=0)
    for split, owned in ((rows.train, made.train), (rows.test, made.test)):
        spans = [[split[i].size for i in owned(cid)] for cid in range(5)]
        assert all(max(a) <= min(b) for a, b in pairwise(spans))


def test_topics_find_what_rows_are_about() -> None:
    rows = some_rows(400, 100)
    config = PartitionConfig(name="topic", topics=4, alpha=0.05)
    report = heterogeneity(partition(config, rows, 4, 0), [row.group or "" for row in rows.train])
    assert report.mean_distance > 0.3


@pytest.mark.parametrize(
    ("config", "rows", "clients", "expected"),
    [
        ({"name": "iid", "min_rows": 5}, 40, 10, "need 50 rows, but there are 40"),
        ({"name": "iid"}, 4, 5, "need 5 rows, but there are 4"),
        ({"name": "topic", "topics": 30}, 20, 2, "30 topics need at least 30 different"),
    ],
)
def test_impossible_partitions_are_refused_with_numbers(
    config: dict[str, Any], rows: int, clients: int, expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        partition(PartitionConfig(**config), some_rows(rows, 0), clients, seed=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dirichlet", "'topic'"),
        ("shards", "'length'"),
        ("column", "partition.by"),
        ("topic", "finds no words"),
    ],
)
def test_rules_say_what_rows_lack(name: Any, expected: str) -> None:
    bare = tuple(Row((), f"{i} +", None, None, None, "row") for i in range(10))
    rows = Rows(bare, bare[:1], "text", (), "made up")
    with pytest.raises(DataError, match=expected):
        partition(PartitionConfig(name=name), rows, 2, seed=0)


def test_filling_up_takes_from_the_largest_and_moves_no_more_than_needed() -> None:
    owners = np.array([0] * 10 + [1] * 6 + [2] * 4, np.int32)
    filled = fill_up(owners, 4, 3, np.arange(20))
    assert np.bincount(filled).tolist() == [7, 6, 4, 3]
    assert (filled != owners).sum() == 3
    assert owners.tolist() == [0] * 10 + [1] * 6 + [2] * 4


def test_an_idle_client_costs_a_few_bytes() -> None:
    small, large = (partition(PartitionConfig(), some_rows(2000, 0), n, 0) for n in (10, 1010))

    def size(made: Any) -> int:
        return int(sum(array.nbytes for array in vars(made).values()))

    assert size(large) - size(small) <= 32 * 1000


@pytest.mark.parametrize("name", CHEAP)
def test_a_thousand_clients_are_divided_at_once(name: Any) -> None:
    rows = some_rows(7000, 1000, groups=10, clients=1000)
    config = PartitionConfig(name=name)
    partition(config, rows, 1000, 0)  # the first call imports
    times = []
    for seed in range(3):
        start = time.perf_counter()
        partition(config, rows, 1000, seed)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.2


# --- heterogeneity --------------------------------------------------------------------------------


def test_the_report_is_right_on_a_case_done_by_hand() -> None:
    rows = some_rows(8, 2, groups=2)
    made = partition(PartitionConfig(name="shards", shards_per_client=1), rows, 2, seed=0)
    report = heterogeneity(made, [row.group or "" for row in rows.train])
    assert sorted(report.counts.tolist()) == [[0, 4], [4, 0]]
    assert report.distances.tolist() == [0.5, 0.5]
    assert report.mean_distance == 0.5
    assert report.effective_groups.tolist() == [1.0, 1.0]


def test_the_report_can_be_written_as_json() -> None:
    rows = some_rows(50, 5)
    made = partition(PartitionConfig(name="quantity"), rows, 4, seed=0)
    report = heterogeneity(made, [row.group or "" for row in rows.train])
    tree = json.loads(json.dumps(report.as_dict()))
    assert tree["num_clients"] == 4
    assert tree["train_sizes"][tree["largest"]["client"]] == max(tree["train_sizes"])
    assert tree["smallest"]["rows"] == min(tree["train_sizes"])


def test_rows_without_groups_get_a_report_of_sizes() -> None:
    made = partition(PartitionConfig(), some_rows(50, 5), 4, seed=0)
    report = heterogeneity(made, None)
    assert report.counts.shape == (4, 0)
    assert report.mean_distance == 0
    assert sum(report.as_dict()["train_sizes"]) == 50


def test_a_client_without_rows_has_no_distance() -> None:
    config = PartitionConfig(name="dirichlet", alpha=0.001, min_rows=0)
    rows = some_rows(40, 0, groups=2)
    made = partition(config, rows, 10, seed=0)
    report = heterogeneity(made, [row.group or "" for row in rows.train])
    empty = report.train_sizes == 0
    assert empty.any()
    assert not report.distances[empty].any()
    assert not report.effective_groups[empty].any()
