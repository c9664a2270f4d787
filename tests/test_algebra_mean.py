"""Padding, truncating and averaging factors, over any ranks and scalings."""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from conformance.factors import (
    HEAD,
    SHAPES,
    Parts,
    adapter,
    close,
    cohorts,
    dense,
    dense_sum,
    mean_of,
    quick,
    same,
    scalings,
    seeds,
    weights,
)
from hypothesis import given
from hypothesis import strategies as st

from fedllm.adapters import Adapter, algebra, name_a, name_b


@quick
@given(seeds, st.integers(1, 8), st.integers(0, 8))
def test_padding_keeps_the_product_and_truncation_undoes_it(
    seed: int, rank: int, more: int
) -> None:
    own = adapter(seed, rank)
    padded = algebra.pad(own, rank + more)
    assert all(padded.rank_of(m) == rank + more for m in SHAPES)
    assert all(close(dense(padded, m), dense(own, m)) for m in SHAPES)
    assert algebra.truncate(padded, rank).digest() == own.digest()


@quick
@given(seeds, st.integers(2, 8), st.integers(1, 7))
def test_truncation_keeps_the_leading_components(seed: int, rank: int, cut: int) -> None:
    own, cut = adapter(seed, rank), min(cut, rank)
    short = algebra.truncate(own, cut)
    for module in SHAPES:
        assert torch.equal(short[name_a(module)], own[name_a(module)][:cut])
        assert torch.equal(short[name_b(module)], own[name_b(module)][:, :cut])
    assert torch.equal(short[HEAD], own[HEAD])
    assert short.scaling == own.scaling


def test_the_mean_of_padded_factors_is_not_the_mean_of_products() -> None:
    parts = [(0.5, algebra.pad(adapter(1, 2), 4)), (0.5, algebra.pad(adapter(2, 4), 4))]
    mixed = Adapter(mean_of(parts), parts[0][1].scaling)
    gap = dense(mixed, "q") - dense_sum(parts, "q")
    assert float(gap.norm()) > 1e-2 * float(dense_sum(parts, "q").norm())


# mean


@quick
@given(cohorts(ranks=st.just(3), scaling=st.just(2.0)))
def test_the_mean_is_the_weighted_mean_of_every_tensor(parts: Parts) -> None:
    total = sum(w for w, _ in parts)
    wanted = {
        n: torch.stack([a[n] * (w / total) for w, a in parts]).sum(dim=0) for n in parts[0][1]
    }
    assert same(mean_of(parts), wanted)


@quick
@given(cohorts(scaling=st.just(2.0)), st.randoms(use_true_random=False))
def test_the_mean_does_not_depend_on_order(parts: Parts, shuffle: Random) -> None:
    shuffled = list(parts)
    shuffle.shuffle(shuffled)
    assert same(mean_of(shuffled), mean_of(parts))


@quick
@given(seeds, st.integers(1, 6), st.lists(weights, min_size=1, max_size=5))
def test_the_mean_of_identical_adapters_is_that_adapter(
    seed: int, rank: int, shares: list[float]
) -> None:
    own = adapter(seed, rank)
    assert same(mean_of([(w, own) for w in shares]), own.tensors)


@quick
@given(cohorts(scaling=st.just(2.0)))
def test_each_component_is_averaged_over_those_that_own_it(parts: Parts) -> None:
    mean = mean_of(parts)
    for module in SHAPES:
        assert mean[name_a(module)].shape[0] == max(a.rank for _, a in parts)
        for j in range(max(a.rank for _, a in parts)):
            owners = [(w, a) for w, a in parts if a.rank > j]
            total = sum(w for w, _ in owners)
            row = torch.stack([w / total * a[name_a(module)][j] for w, a in owners]).sum(0)
            column = torch.stack([w / total * a[name_b(module)][:, j] for w, a in owners]).sum(0)
            assert close(mean[name_a(module)][j], row)
            assert close(mean[name_b(module)][:, j], column)


def test_a_tensor_is_averaged_over_those_that_sent_it() -> None:
    one, two, three = (adapter(k, 3) for k in range(3))
    half = two.select(lambda name: name == name_a("q"))
    mean = mean_of([(1.0, half), (1.0, one), (3.0, three)])
    assert close(
        mean[name_a("q")], (one[name_a("q")] + two[name_a("q")] + 3 * three[name_a("q")]) / 5
    )
    assert close(mean[name_b("q")], (one[name_b("q")] + 3 * three[name_b("q")]) / 4)
    assert set(mean) == set(one)


@quick
@given(seeds, st.integers(1, 6), scalings, st.lists(scalings, min_size=1, max_size=4))
def test_canonical_units_keep_the_product_of_equal_clients(
    seed: int, rank: int, reference: float, others: list[float]
) -> None:
    own = adapter(seed, rank, reference)
    units = [own]
    for scaling in others:
        c = (scaling / reference) ** 0.5
        tensors = {n: t if n == HEAD else t / c for n, t in own.tensors.items()}
        units.append(Adapter(tensors, dict.fromkeys(SHAPES, scaling)))
    mean = Adapter(mean_of([(1.0, u) for u in units]), own.scaling)
    assert all(close(dense(mean, m), dense(own, m)) for m in SHAPES)


def test_the_mean_writes_to_no_participant() -> None:
    parts = [(1.0, adapter(1, 2)), (2.0, adapter(2, 4)), (3.0, adapter(3, 4))]
    before = [a.digest() for _, a in parts]
    mean_of(parts)
    mean_of(parts[1:])
    mean_of(parts[:1])
    assert [a.digest() for _, a in parts] == before


@quick
@given(st.lists(st.floats(0.1, 0.9), min_size=1, max_size=4), seeds)
def test_the_server_as_a_participant_mixes_as_a_buffer_does(shares: list[float], seed: int) -> None:
    now = adapter(seed, 3)
    clients = [adapter(seed + 1 + k, 3) for k in range(len(shares))]
    left = 1.0 - sum(shares)  # negative where the server's rate exceeds 1
    mean = mean_of([(left, now), *zip(shares, clients, strict=True)])
    for name in now:
        steps = [w * (c[name] - now[name]) for w, c in zip(shares, clients, strict=True)]
        assert close(mean[name], now[name] + torch.stack(steps).sum(dim=0), 1e-8)


# identities of the methods


def test_the_mean_of_factors_is_exact_where_one_factor_is_common() -> None:
    own = adapter(0, 3)
    frozen = [
        (w, own.overlaid({name_b(m): adapter(k, 3)[name_b(m)] for m in SHAPES}))
        for k, w in enumerate((0.1, 0.3, 0.6), start=1)
    ]
    mean = Adapter(mean_of(frozen), own.scaling)
    assert all(close(dense(mean, m), dense_sum(frozen, m)) for m in SHAPES)


def test_the_mean_of_factors_misses_the_mean_of_products_by_the_known_residual() -> None:
    parts = [(w, adapter(k, 3)) for k, w in enumerate((0.1, 0.3, 0.6))]
    mean = Adapter(mean_of(parts), parts[0][1].scaling)
    for module in SHAPES:
        a, b = name_a(module), name_b(module)
        residual = torch.stack([w * (x[b] - mean[b]) @ (x[a] - mean[a]) for w, x in parts]).sum(
            dim=0
        )
        assert float(residual.norm()) > 1e-3
        assert close(dense_sum(parts, module) - dense(mean, module), 2.0 * residual)
        rank = int(np.linalg.matrix_rank(residual.numpy(), tol=1e-9))
        assert rank <= (len(parts) - 1) * 3
