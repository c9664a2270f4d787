"""Splits of products and residuals against dense matrices, over any ranks and scalings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
from conformance.factors import (
    SHAPES,
    Parts,
    adapter,
    close,
    cohorts,
    dense,
    dense_sum,
    mean_of,
    quick,
    seeds,
    truncated_svd,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.adapters import Adapter, Product, algebra, name_a, name_b, name_core, name_gain
from fedllm.adapters.factoring import (
    balanced_split,
    leading_qr,
    orthonormal_split,
    qr_split,
    residual,
)

SCALING = {"q": 1.5, "v": 3.0}
Split = Callable[[Mapping[str, Product], int, Mapping[str, float]], dict[str, Tensor]]
SPLITS: dict[str, Split] = {
    "qr": qr_split,
    "orthonormal": orthonormal_split,
    "balanced": lambda p, r, s: balanced_split(p, r, s, 1.0)[0],
}


def cohort(*ranks: int, dtype: torch.dtype = torch.float64) -> Parts:
    """Participants with unequal weights that sum to 1, and equal scalings."""
    total = sum(range(1, len(ranks) + 1))
    return [((k + 1) / total, adapter(k, r, 2.0, dtype)) for k, r in enumerate(ranks)]


def scaled(tensors: Mapping[str, Tensor], path: str, s: float) -> Tensor:
    """Return s B A."""
    return s * tensors[name_b(path)] @ tensors[name_a(path)]


def orthonormal(columns: Tensor) -> bool:
    """Tell whether the columns are."""
    return close(columns.T @ columns, torch.eye(columns.shape[1], dtype=columns.dtype))


def without(own: Adapter, path: str, column: int) -> Adapter:
    """Return the adapter with a dead input column."""
    a = own[name_a(path)].clone()
    a[:, column] = 0
    return own.overlaid({name_a(path): a})


# all splits


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("ranks", [(1, 2, 3), (9, 4, 6)], ids=["by factors", "dense"])
@pytest.mark.parametrize("rank", [14, 6, 2])
def test_every_split_has_the_asked_shapes_and_owns_its_memory(
    split: Split, ranks: Sequence[int], rank: int
) -> None:
    tensors = split(algebra.stack(cohort(*ranks)), rank, SCALING)
    for path, (rows, columns) in SHAPES.items():
        a, b = tensors[name_a(path)], tensors[name_b(path)]
        assert (a.shape, b.shape) == ((rank, columns), (rows, rank))
        for tensor in (a, b):
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@quick
@given(own=seeds, rank=st.integers(1, 6), more=st.integers(0, 4))
def test_every_split_of_one_client_keeps_its_product(
    split: Split, own: int, rank: int, more: int
) -> None:
    one = adapter(own, rank, 4.0)
    tensors = split(algebra.mean_products([(3.0, one)]), rank + more, SCALING)
    for path, s in SCALING.items():
        assert close(scaled(tensors, path, s), dense(one, path), 1e-7)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_every_split_in_single_precision_keeps_the_product(split: Split) -> None:
    parts = cohort(2, 3, dtype=torch.float32)
    tensors = split(algebra.mean_products(parts), 5, SCALING)
    for path, s in SCALING.items():
        got = scaled(tensors, path, s)
        assert got.dtype == torch.float32
        wanted = dense_sum(parts, path)
        assert float((got - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("kept", [0, 1, 3], ids=lambda n: f"{n} of 4 components are alive")
def test_no_component_is_dead_after_a_split(split: Split, kept: int) -> None:
    own = adapter(1, 4)
    short = {n: t.clone() for n, t in own.tensors.items()}
    for path in SHAPES:
        short[name_b(path)][:, kept:] = 0
    products = algebra.stack([(1.0, own.overlaid(short))])
    for rank in (4, 6):
        tensors = split(products, rank, SCALING)
        for path, s in SCALING.items():
            assert close(scaled(tensors, path, s), products[path].dense())
            b, a = tensors[name_b(path)], tensors[name_a(path)]
            assert bool((b.norm(dim=0).maximum(a.norm(dim=1)) > 0.01).all())


# QR


@quick
@given(cohorts(), st.integers(1, 14))
def test_a_truncated_qr_keeps_the_first_columns_and_is_orthonormal(parts: Parts, rank: int) -> None:
    tensors = qr_split(algebra.stack(parts), rank, SCALING)
    for path, s in SCALING.items():
        wanted = dense_sum(parts, path)
        got = scaled(tensors, path, s)
        assert orthonormal(tensors[name_b(path)])
        assert close(got[:, :rank], wanted[:, :rank])
        best = float((wanted - truncated_svd(wanted, rank)).norm())
        assert float((wanted - got).norm()) >= best - 1e-9


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
def test_a_truncated_qr_is_that_of_the_dense_product(rank: int) -> None:
    parts = cohort(2, 3, 4)
    tensors = qr_split(algebra.stack(parts), rank, SCALING)
    for path, s in SCALING.items():
        q, r = np.linalg.qr(dense_sum(parts, path).numpy())
        wanted = torch.from_numpy(q[:, :rank] @ r[:rank])
        assert close(scaled(tensors, path, s), wanted)


def test_a_dead_input_column_costs_a_truncated_qr_its_exactness() -> None:
    own = without(adapter(1, 3), "q", 0)
    for split, is_exact in ((qr_split, False), (orthonormal_split, True)):
        got = scaled(split(algebra.stack([(1.0, own)]), 3, SCALING), "q", 1.5)
        assert (float((got - dense(own, "q")).norm()) < 1e-9) == is_exact


@pytest.mark.parametrize("rank", [1, 4, 14, 17])
@pytest.mark.parametrize("shape", [(20, 14), (14, 20)])
def test_the_leading_part_of_a_weight_is_that_of_its_qr(rank: int, shape: tuple[int, int]) -> None:
    weight = torch.from_numpy(np.random.default_rng(3).normal(size=shape))
    q, r = leading_qr(weight, rank)
    wanted_q, wanted_r = np.linalg.qr(weight.numpy())
    assert (q.shape, r.shape) == ((shape[0], rank), (rank, shape[1]))
    assert close(q @ r, torch.from_numpy(wanted_q[:, :rank] @ wanted_r[:rank]))
    assert orthonormal(q[:, : shape[0]])


def test_a_weight_in_half_precision_is_factored_in_single() -> None:
    weight = torch.from_numpy(np.random.default_rng(3).normal(size=(20, 14))).bfloat16()
    q, r = leading_qr(weight, 14)
    assert q.dtype == r.dtype == torch.float32
    assert close(q @ r, weight.float(), 1e-5)


# SVD


@quick
@given(cohorts(), st.integers(1, 14))
def test_an_orthonormal_split_is_the_truncated_svd_with_orthonormal_b(
    parts: Parts, rank: int
) -> None:
    tensors = orthonormal_split(algebra.stack(parts), rank, SCALING)
    for path, s in SCALING.items():
        assert orthonormal(tensors[name_b(path)])
        assert close(scaled(tensors, path, s), truncated_svd(dense_sum(parts, path), rank))


@quick
@given(cohorts(), st.integers(1, 6), st.sampled_from([0.5, 0.9, 0.99, 0.9999, 1.0]))
def test_a_balanced_split_keeps_the_energy_it_is_asked_to(
    parts: Parts, rank: int, energy: float
) -> None:
    tensors, left = balanced_split(algebra.stack(parts), rank, SCALING, energy)
    for path, s in SCALING.items():
        wanted = dense_sum(parts, path)
        squares = np.linalg.svd(wanted.numpy(), compute_uv=False) ** 2
        share = np.cumsum(squares) / squares.sum()
        needed = int(np.searchsorted(share, min(energy, 1 - 1e-14))) + 1
        major = scaled(tensors, path, s)
        assert close(major, truncated_svd(wanted, rank))
        assert (path in left) == (needed > rank)
        rest = left[path].dense() if path in left else torch.zeros_like(major)
        if path in left:
            assert left[path].a.shape[0] == needed - rank
        lost = float((wanted - major - rest).square().sum())
        kept = float(major.square().sum() + rest.square().sum())
        assert lost <= (1 - energy + 1e-12) * squares.sum()
        assert kept + lost == pytest.approx(squares.sum())
        assert abs(float((major * rest).sum())) < 1e-9 * squares.sum()


@quick
@given(cohorts(ranks=st.integers(3, 6)))
def test_both_factors_of_a_balanced_split_are_of_one_size(parts: Parts) -> None:
    tensors, _ = balanced_split(algebra.stack(parts), 3, SCALING, 0.99)
    for path, s in SCALING.items():
        sizes = np.linalg.svd(dense_sum(parts, path).numpy(), compute_uv=False)[:3]
        wanted = torch.from_numpy(np.sqrt(sizes / s))
        assert close(tensors[name_b(path)].norm(dim=0), wanted)
        assert close(tensors[name_a(path)].norm(dim=1), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identical_clients_leave_nothing_over(dtype: torch.dtype) -> None:
    own = adapter(1, 3, dtype=dtype)
    parts = [(w, own) for w in (0.2, 0.3, 0.5)]
    products = algebra.mean_products(parts)
    tensors, left = balanced_split(products, 3, own.scaling, 1.0)
    assert left == {}
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert all(close(scaled(tensors, m, 2.0), dense(own, m), tolerance) for m in SHAPES)


# what a stored pair misses


def exact(parts: Parts, onto: Adapter, left: Mapping[str, Product]) -> bool:
    """Tell whether residual and stored pair together are the sum of products."""
    total = sum(w for w, _ in parts)
    return all(
        close(dense(onto, m) + (left[m].dense() if m in left else 0.0), dense_sum(parts, m) / total)
        for m in SHAPES
    )


@quick
@given(cohorts(ranks=st.just(3)))
def test_the_residual_of_the_mean_is_exact_and_of_the_lowest_rank(parts: Parts) -> None:
    onto = Adapter(mean_of(parts), parts[0][1].scaling)
    left = residual(parts, onto)
    assert exact(parts, onto, left)
    ranks = {path: product.a.shape[0] for path, product in left.items()}
    assert ranks == (dict.fromkeys(SHAPES, (len(parts) - 1) * 3) if len(parts) > 1 else {})


@quick
@given(cohorts())
def test_the_residual_is_exact_for_any_ranks(parts: Parts) -> None:
    onto = Adapter(mean_of(parts), parts[0][1].scaling)
    assert exact(parts, onto, residual(parts, onto))


@quick
@given(cohorts(ranks=st.just(3)), seeds)
def test_the_residual_is_exact_for_any_stored_pair(parts: Parts, seed: int) -> None:
    onto = adapter(seed + 999, 3, 0.5)
    assert exact(parts, onto, residual(parts, onto))


def test_the_residual_is_the_weighted_covariance_of_the_factors() -> None:
    parts = cohort(3, 3, 3, 3)
    onto = Adapter(mean_of(parts), parts[0][1].scaling)
    for path, product in residual(parts, onto).items():
        a, b = name_a(path), name_b(path)
        terms = [w * (one[b] - onto[b]) @ (one[a] - onto[a]) for w, one in parts]
        assert close(product.dense(), 2.0 * torch.stack(terms).sum(dim=0))


def test_the_residual_of_identical_clients_is_zero() -> None:
    parts = [(w, adapter(1, 3)) for w in (0.2, 0.3, 0.5)]
    onto = Adapter(mean_of(parts), parts[0][1].scaling)
    left = residual(parts, onto)
    assert all(float(product.dense().norm()) < 1e-13 for product in left.values())


def test_the_residual_is_weighted_over_those_that_sent_the_path() -> None:
    one, two, three = (w for _, w in cohort(3, 3, 3))
    lacking = three.select(lambda name: not name.startswith("q."))
    parts = [(1.0, one), (3.0, two), (4.0, lacking)]
    onto = Adapter(mean_of(parts), one.scaling)
    left = residual(parts, onto)
    wanted = (dense(one, "q") + 3 * dense(two, "q")) / 4
    assert close(dense(onto, "q") + left["q"].dense(), wanted)
    assert (left["q"].a.shape[0], left["v"].a.shape[0]) == (3, 6)


def test_the_residual_holds_cores_and_gains() -> None:
    core = torch.from_numpy(np.random.default_rng(5).normal(size=(3, 3)))
    more = {name_core("q"): core, name_gain("q"): torch.tensor(0.5, dtype=torch.float64)}
    parts = [(w, one.overlaid(more)) for w, one in cohort(3, 3)]
    onto = adapter(9, 3)
    terms = [w * one.product("q").dense() for w, one in parts]
    got = residual(parts, onto)["q"].dense()
    assert close(got, torch.stack(terms).sum(dim=0) - dense(onto, "q"))


@pytest.mark.parametrize("rank", [1, 4, 6, 20])
def test_a_truncated_residual_is_the_best_of_its_rank(rank: int) -> None:
    parts = cohort(3, 3, 3)
    onto = Adapter(mean_of(parts), parts[0][1].scaling)
    whole, cut = residual(parts, onto), residual(parts, onto, rank)
    for path in SHAPES:
        assert cut[path].a.shape[0] == min(rank, 6)
        assert close(cut[path].dense(), truncated_svd(whole[path].dense(), rank))


# identities of FedSVD, whose split is `refactor`


def test_refactoring_the_mean_keeps_product_and_row_space() -> None:
    first = adapter(0, 3, 1.0)
    parts = [
        (w, first.overlaid({name_b(m): one[name_b(m)] for m in SHAPES}))
        for w, one in cohort(3, 3, 3)
    ]
    mean = first.overlaid(mean_of(parts))
    products = {m: mean.product(m) for m in SHAPES}
    now = Adapter(algebra.refactor(products, 3, first.scaling), first.scaling)
    for path in SHAPES:
        a, before = now[name_a(path)], first[name_a(path)]
        assert close(dense(now, path), dense(mean, path))
        assert orthonormal(a.T)
        assert close(a.T @ a, torch.linalg.pinv(before) @ before)
