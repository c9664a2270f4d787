"""Which clients are alike: distances between adapters, and clusters from distances.

Clusters are labelled 0, 1, ... in the order in which clients first show them. Clustering of
tensors that have only a shape comes out as for clients that are all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedllm.adapters.adapter import Adapter
from fedllm.adapters.lazy import LazyModule
from fedllm.adapters.names import is_b
from fedllm.seeding import rng

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor
else:
    torch = LazyModule("torch")

_STARTS = 32
_LLOYD_STEPS = 100


def cosine_distances(adapters: Sequence[Adapter]) -> NDArray[np.float64]:
    """Return the mean over paths of 1 - cos(vec B_k, vec B_l), (K, K) in [0, 2] (FedLEASE).

    Two zero matrices are at distance 0, a zero one and another at 1.
    """
    return _mean_over_paths(adapters, _cosine_distance)


def subspace_distances(adapters: Sequence[Adapter], rank: int) -> NDArray[np.float64]:
    """Return the mean over paths of 1 - ||U_k^T U_l||_F^2 / r, (K, K) in [0, 1] (HiLoRA).

    U_k holds the leading r left singular vectors of B_k. Directions whose singular value is only
    rounding are left out, and r is then the larger number of those that two clients have.
    """
    return _mean_over_paths(adapters, lambda tensors: _subspace_distance(tensors, rank))


def _mean_over_paths(
    adapters: Sequence[Adapter], distance: Callable[[Sequence[Tensor]], NDArray[np.float64]]
) -> NDArray[np.float64]:
    names = [name for name in adapters[0] if is_b(name)]
    total = np.zeros((len(adapters), len(adapters)))
    for name in names:
        tensors = [adapter[name] for adapter in adapters]
        if not any(tensor.is_meta for tensor in tensors):
            total += distance(tensors)
    total = (total + total.T) / (2 * len(names))
    np.fill_diagonal(total, 0.0)
    return total


def _cosine_distance(tensors: Sequence[Tensor]) -> NDArray[np.float64]:
    flat = np.stack([tensor.detach().double().cpu().numpy().ravel() for tensor in tensors])
    size = np.linalg.norm(flat, axis=1)
    unit = flat / np.where(size > 0, size, 1.0)[:, None]
    cosine = unit @ unit.T
    cosine[np.logical_and.outer(size == 0, size == 0)] = 1.0
    return np.clip(1.0 - cosine, 0.0, 2.0)


def _subspace_distance(tensors: Sequence[Tensor], rank: int) -> NDArray[np.float64]:
    bases = []
    for tensor in tensors:
        u, s, _ = torch.linalg.svd(tensor.detach(), full_matrices=False)
        real = s > s[0] * torch.finfo(s.dtype).eps * max(tensor.shape)
        bases.append(u[:, real][:, :rank].double().cpu().numpy())
    distances = np.zeros((len(bases), len(bases)))
    for k, one in enumerate(bases):
        for j, other in enumerate(bases[:k]):
            count = max(one.shape[1], other.shape[1])
            shared = float(np.square(one.T @ other).sum())
            distances[k, j] = distances[j, k] = 1.0 - shared / count if count else 0.0
    return np.clip(distances, 0.0, 1.0)


def smoothed(before: Adapter | None, adapter: Adapter, decay: float) -> Adapter:
    """Return decay * before + (1 - decay) B / ||B||_F of every path: where a client's B points.

    Args:
        before: What this returned for the client's last update; None for the first one. Of another
            rank it does not count.
        adapter: The client's update; not modified.
        decay: Weight of the past, from 0 to 1.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        if is_b(name):
            size = tensor.norm()
            unit = tensor / torch.where(size > 0, size, torch.ones_like(size))
            tensors[name] = unit * (1 - decay)
            if before is not None and before[name].shape == tensor.shape:
                tensors[name] = tensors[name] + before[name] * decay
    return Adapter(tensors)


def agglomerate(distances: NDArray[np.float64], max_clusters: int) -> list[int]:
    """Return each client's cluster by average linkage, as many as the best silhouette says.

    Two to `max_clusters` are tried, fewer than there are clients (a silhouette needs that); of
    equally good numbers the smallest is taken. Below three clients all are in one cluster.
    """
    from sklearn.metrics import silhouette_score

    best, chosen = -np.inf, np.zeros(len(distances), dtype=int)
    for count in range(2, min(max_clusters, len(distances) - 1) + 1):
        labels = _linked(distances, count)
        score = silhouette_score(distances, labels, metric="precomputed")
        if score > best + 1e-9:  # a number of clusters does not win by rounding
            best, chosen = score, labels
    return _renumbered(chosen)


def agglomerate_into(distances: NDArray[np.float64], count: int) -> list[int]:
    """Return each client's cluster by average linkage, `count` of them or one a client."""
    if min(count, len(distances)) < 2:
        return [0] * len(distances)
    return _renumbered(_linked(distances, min(count, len(distances))))


def _linked(distances: NDArray[np.float64], count: int) -> NDArray[np.int_]:
    from sklearn.cluster import AgglomerativeClustering

    tree = AgglomerativeClustering(count, metric="precomputed", linkage="average")
    labels: NDArray[np.int_] = tree.fit_predict(distances)
    return labels


def spectral(
    distances: NDArray[np.float64], min_clusters: int, max_clusters: int, seed: int
) -> list[int]:
    """Return each client's cluster by spectral clustering, as many as the eigengap says.

    The affinity is exp(-d^2 / 2 sigma^2) with sigma the median distance of two clients; of the
    allowed numbers of clusters M, the one with the widest gap between the eigenvalues M and M + 1
    of the normalised Laplacian is taken. Everything is deterministic.

    Args:
        distances: (K, K), symmetric, zero on the diagonal; not modified.
        min_clusters: At least 1; K clusters where it is K or more. With 1 the answer is nearly
            always 1, because an affinity of this width connects everyone.
        max_clusters: At least `min_clusters`.
        seed: Where the grouping of the eigenvectors starts, of more clients than are all tried.
    """
    clients = len(distances)
    if clients <= max(min_clusters, 1):
        return list(range(clients))
    apart = distances[~np.eye(clients, dtype=bool)]
    sigma = float(np.median(apart)) or float(apart.mean()) or 1.0
    affinity = np.exp(-np.square(distances / sigma) / 2)
    root = 1.0 / np.sqrt(affinity.sum(axis=1))
    values, vectors = np.linalg.eigh(np.eye(clients) - root[:, None] * affinity * root)
    allowed = range(max(min_clusters, 1), min(max_clusters, clients - 1) + 1)
    gaps = [values[count] - values[count - 1] for count in allowed]
    leading = vectors[:, : allowed[int(np.argmax(gaps))]]
    length = np.linalg.norm(leading, axis=1, keepdims=True)
    return _renumbered(_k_means(leading / np.where(length > 0, length, 1.0), seed))


def _k_means(rows: NDArray[np.float64], seed: int) -> NDArray[np.int_]:
    """Return the grouping of least spread into as many groups as there are columns."""
    best, chosen = np.inf, np.zeros(len(rows), dtype=int)
    for first in rng(seed, "spectral").permutation(len(rows))[:_STARTS]:
        centres = rows[[first]]
        while len(centres) < rows.shape[1]:  # the farthest row is the next centre
            centres = np.vstack([centres, rows[[_squares(rows, centres).min(axis=1).argmax()]]])
        labels = _squares(rows, centres).argmin(axis=1)
        for _ in range(_LLOYD_STEPS):
            own = [rows[labels == c] for c in range(len(centres))]
            centres = np.stack(
                [g.mean(axis=0) if len(g) else c for g, c in zip(own, centres, strict=True)]
            )
            before, labels = labels, _squares(rows, centres).argmin(axis=1)
            if np.array_equal(before, labels):
                break
        spread = float(_squares(rows, centres).min(axis=1).sum())
        if spread < best - 1e-9:
            best, chosen = spread, labels
    return chosen


def _squares(rows: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = np.square(rows[:, None] - centres).sum(axis=2)
    return squares


def _renumbered(labels: NDArray[np.int_]) -> list[int]:
    order: dict[int, int] = {}
    return [order.setdefault(int(label), len(order)) for label in labels]
