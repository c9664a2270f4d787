"""Distances between clients and the clusters that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
import torch
from conformance.factors import SHAPES, adapter, quick, seeds
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedllm.adapters import Adapter, name_b
from fedllm.adapters.clustering import (
    agglomerate,
    cosine_distances,
    spectral,
    subspace_distances,
)

Cluster = Callable[[NDArray[np.float64]], list[int]]
CLUSTERERS: dict[str, Cluster] = {
    "linkage": lambda distances: agglomerate(distances, 5),
    "spectral": lambda distances: spectral(distances, 2, 5, 0),
}


def planted(groups: list[int], seed: int = 0, noise: float = 0.15) -> list[Adapter]:
    """Return clients of which those of one group have nearly the same B."""
    members = []
    for k, group in enumerate(groups):
        centre, own = adapter(1000 * seed + group, 3), adapter(1000 * seed + 100 + k, 3)
        b = {name_b(m): centre[name_b(m)] + noise * own[name_b(m)] for m in SHAPES}
        members.append(own.overlaid(b))
    return members


def changed(own: Adapter, factor: float, turn: torch.Tensor | None = None) -> Adapter:
    """Return the adapter with factor B R."""
    names = [name_b(m) for m in SHAPES]
    return own.overlaid({n: factor * (own[n] if turn is None else own[n] @ turn) for n in names})


# distances


def test_cosine_distances_are_those_of_the_vectors() -> None:
    clients = [adapter(k, 3) for k in range(4)]
    got = cosine_distances(clients)
    for k, one in enumerate(clients):
        for j, other in enumerate(clients):
            each = []
            for path in SHAPES:
                x, y = (c[name_b(path)].numpy().ravel() for c in (one, other))
                each.append(1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y))
            assert got[k, j] == pytest.approx(np.mean(each), abs=1e-12)
    assert (got == got.T).all()
    assert (np.diag(got) == 0).all()


@quick
@given(seeds, st.floats(0.1, 100.0))
def test_cosine_distances_do_not_see_size_but_sign(seed: int, factor: float) -> None:
    one, two = adapter(seed, 3), adapter(seed + 1, 3)
    plain = cosine_distances([one, two])[0, 1]
    assert cosine_distances([changed(one, factor), two])[0, 1] == pytest.approx(plain)
    assert cosine_distances([changed(one, -factor), two])[0, 1] == pytest.approx(2 - plain)


def test_untrained_clients_are_alike_and_unlike_any_other() -> None:
    one, zero = adapter(1, 3), changed(adapter(2, 3), 0.0)
    for got in (cosine_distances([one, zero, zero]), subspace_distances([one, zero, zero], 3)):
        assert got == pytest.approx(np.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]]))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_subspace_distances_are_those_of_the_projectors(rank: int) -> None:
    clients = [adapter(k, 4) for k in range(3)]
    got = subspace_distances(clients, rank)
    count = min(rank, 4)
    for k, one in enumerate(clients):
        for j, other in enumerate(clients):
            each = []
            for path in SHAPES:
                u, v = (np.linalg.svd(c[name_b(path)].numpy())[0][:, :count] for c in (one, other))
                each.append(1 - np.linalg.norm(u.T @ v) ** 2 / count)
            assert got[k, j] == pytest.approx(np.mean(each), abs=1e-12)


@quick
@given(seeds, st.integers(1, 4), st.floats(0.1, 10.0))
def test_subspace_distances_do_not_see_the_basis(seed: int, rank: int, factor: float) -> None:
    one, two = adapter(seed, 4), adapter(seed + 1, 4)
    turn = torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 4)))).Q
    plain = subspace_distances([one, two], rank)
    assert 0 <= plain.min() <= plain.max() <= 1
    other = changed(one, factor, turn)
    assert subspace_distances([other, two], rank) == pytest.approx(plain, abs=1e-6)
    assert subspace_distances([one, other], rank)[0, 1] < 1e-6


def test_a_deficient_basis_is_compared_by_what_it_has() -> None:
    one = adapter(1, 4)
    short = {name_b(m): one[name_b(m)].clone() for m in SHAPES}
    for tensor in short.values():
        tensor[:, 1:] = tensor[:, :1]
    single = one.overlaid(short)
    assert subspace_distances([single, changed(single, 3.0)], 4)[0, 1] < 1e-12
    assert subspace_distances([single, one], 4)[0, 1] == pytest.approx(0.75)


# clusters


@pytest.mark.parametrize("cluster", CLUSTERERS.values(), ids=CLUSTERERS)
@pytest.mark.parametrize(
    "groups", [[0, 0, 1, 1], [0, 1, 0, 1, 2, 2, 0], [0, 1, 2, 3, 0, 1, 2, 3, 3]], ids=str
)
@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_found(cluster: Cluster, groups: list[int], seed: int) -> None:
    clients = planted(groups, seed)
    assert cluster(cosine_distances(clients)) == groups
    assert cluster(subspace_distances(clients, 3)) == groups


@pytest.mark.parametrize("cluster", CLUSTERERS.values(), ids=CLUSTERERS)
@quick
@given(
    groups=st.lists(st.integers(0, 3), min_size=4, max_size=12),
    seed=st.integers(0, 50),
    shuffle=st.randoms(use_true_random=False),
)
def test_clusters_do_not_depend_on_the_order_of_clients(
    cluster: Cluster, groups: list[int], seed: int, shuffle: Random
) -> None:
    clients = planted(groups, seed, noise=0.5)
    order = list(range(len(clients)))
    shuffle.shuffle(order)
    plain = cluster(cosine_distances(clients))
    mixed = cluster(cosine_distances([clients[k] for k in order]))
    back = [mixed[order.index(k)] for k in range(len(clients))]
    pairs = set(zip(plain, back, strict=True))
    assert len(pairs) == len(set(plain)) == len(set(back))
    assert list(dict.fromkeys(mixed)) == list(range(len(set(mixed))))


@pytest.mark.parametrize("clients", [1, 2])
def test_one_or_two_clients_are_one_cluster(clients: int) -> None:
    assert agglomerate(1.0 - np.eye(clients), 4) == [0] * clients
    assert spectral(1.0 - np.eye(clients), 1, 4, 0) == [0] * clients


def test_the_number_of_clusters_stays_within_bounds() -> None:
    distances = cosine_distances(planted([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]))
    assert max(agglomerate(distances, 5)) + 1 == 4
    assert max(agglomerate(distances, 3)) + 1 == 3
    assert set(agglomerate(distances, 1)) == {0}
    assert max(spectral(distances, 2, 6, 0)) + 1 == 4
    assert set(spectral(distances, 1, 1, 0)) == {0}
    assert max(spectral(distances, 2, 3, 0)) + 1 == 3
    assert max(spectral(distances, 5, 6, 0)) + 1 in {5, 6}
    assert spectral(distances[:3, :3], 3, 6, 0) == [0, 1, 2]


@pytest.mark.parametrize("cluster", CLUSTERERS.values(), ids=CLUSTERERS)
@pytest.mark.parametrize("clients", [3, 4, 8])
def test_clients_that_are_all_alike_are_clustered_in_some_fixed_way(
    cluster: Cluster, clients: int
) -> None:
    labels = cluster(np.zeros((clients, clients)))
    assert labels == cluster(np.zeros((clients, clients)))
    assert labels[0] == 0
    assert max(labels) < 5


def test_half_of_the_clients_at_one_place_leave_a_scale() -> None:
    distances = np.ones((5, 5)) - np.eye(5)
    distances[:4, :4] = 0.0  # the median distance is zero
    assert spectral(distances, 2, 4, 0) == [0, 0, 0, 0, 1]


def test_shapes_alone_are_all_alike() -> None:
    shapes = [
        Adapter({n: t.to("meta") for n, t in one.tensors.items()}, one.scaling)
        for one in planted([0, 1, 2])
    ]
    assert not cosine_distances(shapes).any()
    assert not subspace_distances(shapes, 3).any()
