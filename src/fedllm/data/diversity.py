"""How unlike the clients are: sizes, mixes of groups, and their distance from the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedllm.data.partitions import Partition


@dataclass(frozen=True)
class HeterogeneityReport:
    """What a partition did to the training rows."""

    train_sizes: npt.NDArray[np.int64]
    """Shape (clients,)."""
    test_sizes: npt.NDArray[np.int64]
    """Shape (clients,)."""
    group_names: tuple[str, ...]
    """Empty where rows have no groups; then the fields below are empty or 0."""
    counts: npt.NDArray[np.int64]
    """Training rows of each client and group, shape (clients, groups)."""
    distances: npt.NDArray[np.float64]
    """Total variation distance of each client's mix of groups from the mix of all rows: 0 is the
    same, 1 has nothing in common; shape (clients,). A client without rows has 0."""
    mean_distance: float
    """Mean of `distances`, weighted by size."""
    effective_groups: npt.NDArray[np.float64]
    """exp(entropy) of each client's mix: how many equally large groups would be as diverse."""

    @property
    def largest(self) -> int:
        """The client with the most training rows."""
        return int(np.argmax(self.train_sizes))

    @property
    def smallest(self) -> int:
        """The client with the fewest training rows."""
        return int(np.argmin(self.train_sizes))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold."""
        return {
            "num_clients": len(self.train_sizes),
            "train_sizes": self.train_sizes.tolist(),
            "test_sizes": self.test_sizes.tolist(),
            "largest": {"client": self.largest, "rows": int(self.train_sizes.max())},
            "smallest": {"client": self.smallest, "rows": int(self.train_sizes.min())},
            "group_names": list(self.group_names),
            "counts": self.counts.tolist(),
            "distances": self.distances.tolist(),
            "mean_distance": self.mean_distance,
            "effective_groups": self.effective_groups.tolist(),
        }


def heterogeneity(partition: Partition, groups: Sequence[str] | None) -> HeterogeneityReport:
    """Compare each client's training rows with all of them.

    Args:
        partition: Who owns which rows.
        groups: Label or category of each training row, or None.
    """
    clients = partition.num_clients
    names = tuple(sorted(set(groups))) if groups is not None else ()
    counts = np.zeros((clients, len(names)), np.int64)
    if groups is not None:
        code_of = {name: code for code, name in enumerate(names)}
        codes = np.array([code_of[group] for group in groups], np.int64)
        owners = np.repeat(np.arange(clients), partition.train_sizes)
        np.add.at(counts, (owners, codes[partition.train_rows]), 1)
    sizes = partition.train_sizes
    mixes = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    overall = counts.sum(0) / max(counts.sum(), 1)
    distances = 0.5 * np.abs(mixes - overall).sum(1) * (sizes > 0)
    logs = np.log(mixes, where=mixes > 0, out=np.zeros_like(mixes))
    return HeterogeneityReport(
        train_sizes=sizes,
        test_sizes=partition.test_sizes,
        group_names=names,
        counts=counts,
        distances=distances,
        mean_distance=float((distances * sizes).sum() / max(int(sizes.sum()), 1)),
        effective_groups=np.exp(-(mixes * logs).sum(1)) * (counts.sum(1) > 0),
    )
