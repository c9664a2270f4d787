"""Who owns which rows: every training and test row goes to exactly one client."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedllm.config import PartitionConfig
from fedllm.data.dataset import Dataset
from fedllm.data.rows import Rows
from fedllm.errors import DataError
from fedllm.registry import Entry, Table
from fedllm.seeding import rng

Owners = npt.NDArray[np.int32]
"""The client of each row."""

PARTITIONS = Table(
    "partition",
    {
        "iid": Entry("fedllm.data.partitioners:iid", "rows dealt out at random, equally many each"),
        "dirichlet": Entry(
            "fedllm.data.partitioners:dirichlet",
            "each label or category spread over clients by Dirichlet(alpha)",
        ),
        "shards": Entry(
            "fedllm.data.partitioners:shards",
            "each client gets a few shards of one label each (pathological)",
        ),
        "column": Entry(
            "fedllm.data.partitioners:column",
            "by a natural id: what one owner wrote stays together",
        ),
        "quantity": Entry(
            "fedllm.data.partitioners:quantity",
            "the same mix for all, but unequally many rows by Dirichlet(alpha)",
        ),
        "length": Entry(
            "fedllm.data.partitioners:length",
            "from the client with the shortest rows to the longest",
        ),
        "topic": Entry(
            "fedllm.data.partitioners:topic",
            "TF-IDF and k-means find topics, which Dirichlet(alpha) spreads over clients",
        ),
    },
)
"""How rows can be divided; each entry is a function (config, rows, num_clients, rng) -> owners of
the training rows and owners of the test rows."""


@dataclass(frozen=True)
class Partition:
    """The rows of each client: a slice of an order of all rows."""

    train_rows: npt.NDArray[np.int32]
    """Training row numbers, client after client, shape (train rows,)."""
    train_offsets: npt.NDArray[np.int64]
    """Client k owns `train_rows[train_offsets[k]:train_offsets[k + 1]]`, shape (clients + 1,)."""
    test_rows: npt.NDArray[np.int32]
    """Test row numbers, client after client, shape (test rows,)."""
    test_offsets: npt.NDArray[np.int64]
    """Likewise for the test rows; a client may own none."""

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return len(self.train_offsets) - 1

    @property
    def train_sizes(self) -> npt.NDArray[np.int64]:
        """Training rows of each client, shape (clients,)."""
        return np.diff(self.train_offsets)

    @property
    def test_sizes(self) -> npt.NDArray[np.int64]:
        """Test rows of each client, shape (clients,)."""
        return np.diff(self.test_offsets)

    def train(self, cid: int) -> npt.NDArray[np.int32]:
        """Return the training rows of a client in ascending order, as a view."""
        return self.train_rows[self.train_offsets[cid] : self.train_offsets[cid + 1]]

    def test(self, cid: int) -> npt.NDArray[np.int32]:
        """Return the test rows of a client in ascending order, as a view."""
        return self.test_rows[self.test_offsets[cid] : self.test_offsets[cid + 1]]


def partition(
    config: PartitionConfig, data: Dataset | Rows, num_clients: int, seed: int
) -> Partition:
    """Divide the rows of both splits among clients, test rows in the proportions of train rows.

    The same arguments give the same partition. A client may have no test row, but has at least
    `min_rows` training rows; where the rule gives it fewer, rows move from the largest clients.

    Args:
        config: The rule and its settings.
        data: Rows with the groups, owners or texts that the rule goes by.
        num_clients: Size of the population.
        seed: Root of the random streams.

    Raises:
        DataError: If there are too few rows, or they lack what the rule goes by.
    """
    rows = data.rows if isinstance(data, Dataset) else data
    needed, present = config.min_rows * num_clients, len(rows.train)
    if needed > present:
        raise DataError(
            f"{num_clients} clients with at least {config.min_rows} training rows each need "
            f"{needed} rows, but there are {present}. Lower federation.num_clients or "
            "federation.partition.min_rows, or use more data"
        )
    divide = PARTITIONS.load(config.name)
    train, test = divide(config, rows, num_clients, rng(seed, "partition", config.name))
    shuffled = rng(seed, "partition", "order").permutation(present)
    train = fill_up(train, num_clients, config.min_rows, shuffled)
    train_rows, train_offsets = _by_owner(train, num_clients)
    test_rows, test_offsets = _by_owner(test, num_clients)
    return Partition(train_rows, train_offsets, test_rows, test_offsets)


def fill_up(
    owners: Owners, num_clients: int, min_rows: int, order: npt.NDArray[np.int64]
) -> Owners:
    """Return owners with at least `min_rows` rows for each client, moved from the largest.

    Args:
        owners: Not modified.
        num_clients: Size of the population.
        min_rows: At most `len(owners) / num_clients`.
        order: All row numbers; a client gives its last rows in this order first.
    """
    sizes = np.bincount(owners, minlength=num_clients)
    poor = np.flatnonzero(sizes < min_rows)
    if not len(poor):
        return owners
    owners = owners.copy()
    by_client = order[np.argsort(owners[order], kind="stable")]
    ends = np.cumsum(sizes)  # one past the last row that each client still owns
    rich = [(-int(size), cid) for cid, size in enumerate(sizes) if size > min_rows]
    heapq.heapify(rich)
    for cid in poor.tolist():
        for _ in range(min_rows - int(sizes[cid])):
            size, donor = rich[0]
            ends[donor] -= 1
            owners[by_client[ends[donor]]] = cid
            if -size - 1 > min_rows:
                heapq.heapreplace(rich, (size + 1, donor))
            else:
                heapq.heappop(rich)
    return owners


def _by_owner(
    owners: Owners, num_clients: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    offsets = np.zeros(num_clients + 1, np.int64)
    np.cumsum(np.bincount(owners, minlength=num_clients), out=offsets[1:])
    return np.argsort(owners, kind="stable").astype(np.int32), offsets
