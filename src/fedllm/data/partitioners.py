"""The rules by which rows go to clients; most are groups of rows and each client's share of them.

Each rule takes (config, rows, num_clients, generator) and returns the owners of the training rows
and those of the test rows. Test rows follow the proportions of the training rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count

import numpy as np
import numpy.typing as npt

from fedllm.config import PartitionConfig
from fedllm.data.rows import Row, Rows
from fedllm.errors import DataError

Owners = npt.NDArray[np.int32]
Codes = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]
"""What part of each group each client gets, shape (groups, clients); rows sum to 1."""


def iid(
    config: PartitionConfig, rows: Rows, num_clients: int, generator: np.random.Generator
) -> tuple[Owners, Owners]:
    """Deal rows out at random; sizes differ by one row at most."""
    return _alike(rows, np.full((1, num_clients), 1 / num_clients), generator)


def quantity(
    config: PartitionConfig, rows: Rows, num_clients: int, generator: np.random.Generator
) -> tuple[Owners, Owners]:
    """Deal rows out at random in sizes drawn from Dirichlet(alpha)."""
    return _alike(rows, _dirichlet(config.alpha, 1, num_clients, generator), generator)


def dirichlet(
    config: PartitionConfig, rows: Rows, num_clients: int, generator: np.random.Generator
) -> tuple[Owners, Owners]:
    """Spread each group over clients by shares drawn from Dirichlet(alpha), group by group."""
    train, test, names = _groups(config, rows)
    shares = _dirichlet(config.alpha, len(names), num_clients, generator)
    return spread(train, shares, generator), spread(test, shares, generator)


def shards(
    config: PartitionConfig, rows: Rows, num_clients: int, generator: np.random.Generator
) -> tuple[Owners, Owners]:
    """Cut groups into shards of about one size and give each client some at random.

    Raises:
        DataError: If there are fewer shards than groups.
    """
    train, test, names = _groups(config, rows)
    total = num_clients * config.shards_per_client
    if total < len(names):
        raise DataError(
            f"{num_clients} clients with {config.shards_per_client} shards each make {total} "
            f"shards, too few for {len(names)} groups. Raise federation.num_clients or "
            "federation.partition.shards_per_client"
        )
    counts = _apportion(np.bincount(train, minlength=len(names)), total)
    group_of_shard = np.repeat(np.arange(len(names)), counts)
    client_of_shard = generator.permutation(total) // config.shards_per_client
    shares = np.zeros((len(names), num_clients))
    np.add.at(shares, (group_of_shard, client_of_shard), 1 / counts[group_of_shard])
    return spread(train, shares, generator), spread(test, shares, generator)


def column(
    config: PartitionConfig, rows: Rows, num_clients: int, generator: np.random.Generator
) -> tuple[Owners, Owners]:
    """Keep the rows of each natural owner together; owners go round-robin, largest first.

    Test rows of owners that training does not know go to clients in turn.

    Raises:
        DataError: If rows name no owner, or there are fewer owners than clients.
    """
    owners = [row.client for row in rows.train]
    if None in owners:
        raise DataError(
            "federation.partition 'column' needs a column that says whose each row is. Set "
            "federation.partition.by (or data.columns.client) to its name"
        )
    counts = Counter(owners)
    if len(counts) < num_clients:
        raise DataError(
            f"the training rows have {len(counts)} different owners, fewer than the "
            f"{num_clients} clients. Lower federation.num_clients to {len(counts)} or fewer"
        )
    ranked = sorted(counts, key=lambda name: (-counts[name], str(name)))
    client_of = {name: place % num_clients for place, name in enumerate(ranked)}
    turn = count()
    test = [
        client_of[row.client] if row.client in client_of else next(turn) % num_clients
        for row in rows.test
    ]
    return np.array([client_of[name] for name in owners], np.int32), np.array(test, np.int32)


def length(
    config: PartitionConfig, rows: Rows, num_clients: int, generator: np.random.Generator
) -> tuple[Owners, Owners]:
    """Cut the rows, sorted by their number of characters, into slices of equal size."""
    sizes = np.array([row.size for row in rows.train])
    order = np.lexsort((generator.permutation(len(sizes)), sizes))
    owners = np.empty(len(sizes), np.int32)
    owners[order] = np.arange(len(sizes)) * num_clients // len(sizes)
    # The place a test row would have among the training rows decides; ties spread evenly.
    tests = np.array([row.size for row in rows.test])
    ranked = sizes[order]
    low = np.searchsorted(ranked, tests, side="left")
    high = np.searchsorted(ranked, tests, side="right")
    place = low + generator.random(len(tests)) * (high - low)
    place = np.minimum(place.astype(np.int64), len(sizes) - 1)
    return owners, owners[order[place]]


def topic(
    config: PartitionConfig, rows: Rows, num_clients: int, generator: np.random.Generator
) -> tuple[Owners, Owners]:
    """Find topics in what the rows are about, and spread them by Dirichlet(alpha).

    Raises:
        DataError: If there are fewer rows than topics, or no words in them.
    """
    train, test = _topics(rows, config.topics, int(generator.integers(2**31)))
    shares = _dirichlet(config.alpha, config.topics, num_clients, generator)
    return spread(train, shares, generator), spread(test, shares, generator)


def spread(codes: Codes, shares: Shares, generator: np.random.Generator) -> Owners:
    """Give each client its share of each group, rounded so that every row has one owner.

    Args:
        codes: The group of each row.
        shares: Shape (groups, clients).
        generator: Decides which rows of a group a client gets.
    """
    shuffled = generator.permutation(len(codes))
    by_group = shuffled[np.argsort(codes[shuffled], kind="stable")]
    ends = np.cumsum(np.bincount(codes, minlength=len(shares)))
    owners = np.empty(len(codes), np.int32)
    for code, end in enumerate(ends.tolist()):
        members = by_group[(ends[code - 1] if code else 0) : end]
        cuts = np.rint(np.cumsum(shares[code]) * len(members))
        cuts[-1] = len(members)
        owners[members] = np.searchsorted(cuts, np.arange(len(members)), side="right")
    return owners


def _alike(rows: Rows, shares: Shares, generator: np.random.Generator) -> tuple[Owners, Owners]:
    """Spread all rows as one group."""
    train, test = np.zeros(len(rows.train), np.int64), np.zeros(len(rows.test), np.int64)
    return spread(train, shares, generator), spread(test, shares, generator)


def _dirichlet(
    alpha: float, groups: int, num_clients: int, generator: np.random.Generator
) -> Shares:
    shares: Shares = generator.dirichlet(np.full(num_clients, alpha), size=groups)
    return shares


def _apportion(sizes: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Divide `total` shards over groups by size, at least one each (largest remainder)."""
    spare = total - len(sizes)
    quota = sizes / sizes.sum() * spare
    counts: npt.NDArray[np.int64] = np.floor(quota).astype(np.int64) + 1
    largest = np.argsort(counts - quota, kind="stable")[: total - int(counts.sum())]
    counts[largest] += 1
    return counts


def _groups(config: PartitionConfig, rows: Rows) -> tuple[Codes, Codes, list[str]]:
    """Number the groups of both splits; groups that only test has get numbers, too."""
    every = (*rows.train, *rows.test)
    names = sorted({row.group for row in every if row.group is not None})
    if any(row.group is None for row in every):
        raise DataError(
            f"federation.partition '{config.name}' needs a label or category, which the rows do "
            "not have. Set federation.partition.by to a column that has one, or use partition "
            "'topic' (finds topics in the texts) or 'length'"
        )
    code_of = {name: code for code, name in enumerate(names)}

    def codes(split: Sequence[Row]) -> Codes:
        return np.array([code_of[row.group or ""] for row in split], np.int64)

    return codes(rows.train), codes(rows.test), names


def _topics(rows: Rows, topics: int, seed: int) -> tuple[Codes, Codes]:
    """Cluster the training rows and find the nearest cluster of each test row."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # has no types

    texts = [row.subject for row in rows.train]
    if len(set(texts)) < topics:
        raise DataError(
            f"{topics} topics need at least {topics} different training rows, but there are "
            f"{len(set(texts))}. Lower federation.partition.topics"
        )
    weigh = TfidfVectorizer(max_features=2000, stop_words="english", sublinear_tf=True)
    try:
        vectors = weigh.fit_transform(texts)
    except ValueError:  # sklearn's "empty vocabulary"
        raise DataError(
            "federation.partition 'topic' finds no words in the rows. Use 'length' or 'iid'"
        ) from None
    cluster = KMeans(topics, n_init=1, random_state=seed)
    with threadpool_limits(1):  # sums over threads would depend on their number
        train = cluster.fit_predict(vectors)
        test = cluster.predict(weigh.transform([row.subject for row in rows.test]))
    return train.astype(np.int64), test.astype(np.int64)
