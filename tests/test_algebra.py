"""Stacking and refactoring low-rank factors against dense matrices, over any ranks and scalings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
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
    quick,
    scalings,
    seeds,
    truncated_svd,
)
from hypothesis import given
from hypothesis import strategies as st

from fedllm.adapters import Adapter, Product, algebra, is_a, name_a, name_b

# stacking


@quick
@given(cohorts(weight=st.floats(-2.0, 10.0)))
def test_a_stack_is_exact_for_any_ranks_scalings_and_weights(parts: Parts) -> None:
    products = algebra.stack(parts)
    assert set(products) == set(SHAPES)
    for module, product in products.items():
        assert close(product.dense(), dense_sum(parts, module))
        assert product.b.shape[1] == sum(a.rank for _, a in parts)


@quick
@given(cohorts(ranks=st.integers(2, 6)), st.data())
def test_splitting_a_client_by_rank_leaves_the_stack(parts: Parts, data: st.DataObject) -> None:
    weight, whole = parts[0]
    cut = data.draw(st.integers(1, whole.rank - 1))
    rest = {
        n: whole[n] if n == HEAD else whole[n][cut:] if is_a(n) else whole[n][:, cut:]
        for n in whole
    }
    pieces = [(weight, algebra.truncate(whole, cut)), (weight, replace(whole, tensors=rest))]
    split = algebra.stack([*pieces, *parts[1:]])
    for module, product in algebra.stack(parts).items():
        assert close(split[module].dense(), product.dense())


def test_a_stack_holds_every_module_that_anyone_sent() -> None:
    one, two = adapter(1, 3), adapter(2, 4)
    lacking = two.select(lambda name: not name.startswith("q."))
    for parts in ([(0.5, one), (0.5, lacking)], [(0.5, lacking), (0.5, one)]):
        products = algebra.stack(parts)
        assert close(products["q"].dense(), 0.5 * dense(one, "q"))
        assert close(products["v"].dense(), 0.5 * dense(one, "v") + 0.5 * dense(two, "v"))


def test_a_stale_update_stacks_onto_the_present_state() -> None:
    now, client, then = adapter(1, 3), adapter(2, 4, 1.5), adapter(3, 3)
    stacked = algebra.stack([(1.0, now), (1.0, client), (-1.0, then)])
    for module in SHAPES:
        wanted = dense(now, module) + dense(client, module) - dense(then, module)
        assert close(stacked[module].dense(), wanted)


def test_weights_become_shares() -> None:
    parts = [(40.0, adapter(1, 2)), (10.0, adapter(2, 2))]
    assert [w for w, _ in algebra.normalised(parts)] == [0.8, 0.2]


# refactor


@pytest.mark.parametrize("ranks", [(1, 2, 3), (8, 4, 6)], ids=["by QR", "dense"])
@pytest.mark.parametrize("rank", [1, 3, 5, 6, 14])
def test_refactor_is_the_truncated_svd_of_the_sum(ranks: Sequence[int], rank: int) -> None:
    parts = [(0.2 * (k + 1), adapter(k, r, 16 / r)) for k, r in enumerate(ranks)]
    scaling = {"q": 1.5, "v": 3.0}
    tensors = algebra.refactor(algebra.stack(parts), rank, scaling)
    for module, s in scaling.items():
        b, a = tensors[name_b(module)], tensors[name_a(module)]
        matrix = dense_sum(parts, module)
        assert (b.shape, a.shape) == ((SHAPES[module][0], rank), (rank, SHAPES[module][1]))
        assert close(s * b @ a, truncated_svd(matrix, rank))
        tail = np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:]
        lost = float((matrix - s * b @ a).square().sum())
        assert lost == pytest.approx(float((tail**2).sum()), rel=1e-9, abs=1e-18)


@quick
@given(cohorts(), st.integers(1, 14))
def test_refactor_gives_orthonormal_rows_so_that_no_component_is_dead(
    parts: Parts, rank: int
) -> None:
    tensors = algebra.refactor(algebra.stack(parts), rank, dict.fromkeys(SHAPES, 2.0))
    for module in SHAPES:
        a = tensors[name_a(module)]
        assert close(a @ a.T, torch.eye(rank, dtype=a.dtype))


@quick
@given(cohorts(ranks=st.integers(1, 3)), st.integers(1, 6), st.integers(1, 6))
def test_a_smaller_rank_is_the_leading_part_of_a_larger_one(
    parts: Parts, one: int, two: int
) -> None:
    small, large = sorted((one, two))
    products, scaling = algebra.stack(parts), dict.fromkeys(SHAPES, 0.5)
    wide = Adapter(algebra.refactor(products, large, scaling), scaling)
    narrow = Adapter(algebra.refactor(products, small, scaling), scaling)
    for module in SHAPES:
        assert close(dense(algebra.truncate(wide, small), module), dense(narrow, module))


@quick
@given(seeds, st.integers(1, 14), scalings, scalings)
def test_refactor_of_one_client_at_its_rank_keeps_the_product(
    seed: int, rank: int, scaling: float, target: float
) -> None:
    own = adapter(seed, rank, scaling)
    new = dict.fromkeys(SHAPES, target)
    factored = Adapter(algebra.refactor(algebra.stack([(1.0, own)]), rank, new), new)
    assert all(close(dense(factored, m), dense(own, m)) for m in SHAPES)


@pytest.mark.parametrize("inner", [1, 4, 13, 14, 30], ids=lambda r: f"R={r}")
def test_singular_triplets_are_those_of_the_dense_matrix(inner: int) -> None:
    draw = torch.Generator().manual_seed(inner)
    product = Product(
        torch.randn(20, inner, generator=draw, dtype=torch.float64),
        torch.randn(inner, 14, generator=draw, dtype=torch.float64),
    )
    u, s, vh = algebra.svd(product)
    count = min(inner, 14)
    wanted = np.linalg.svd(product.dense().numpy(), compute_uv=False)
    assert (u.shape, s.shape, vh.shape) == ((20, count), (count,), (count, 14))
    assert np.allclose(s.numpy(), wanted[:count], atol=1e-9)
    assert close((u * s) @ vh, product.dense())
    assert close(u.T @ u, torch.eye(count, dtype=torch.float64))
    few = algebra.svd(product, 2)
    assert [t.shape for t in few] == [(20, min(2, count)), (min(2, count),), (min(2, count), 14)]


@pytest.mark.parametrize("ranks", [(2, 1), (9, 9)], ids=["by QR", "dense"])
def test_refactor_in_single_precision_agrees_to_four_digits(ranks: Sequence[int]) -> None:
    parts = [(0.5, adapter(k, r, dtype=torch.float32)) for k, r in enumerate(ranks)]
    tensors = algebra.refactor(algebra.stack(parts), 5, dict.fromkeys(SHAPES, 2.0))
    for module in SHAPES:
        got = 2.0 * tensors[name_b(module)] @ tensors[name_a(module)]
        assert got.dtype == torch.float32
        wanted = truncated_svd(dense_sum(parts, module).double(), 5)
        assert float((got - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("ranks", [(2, 3), (9, 9)], ids=["by QR", "dense"])
def test_factors_do_not_hold_on_to_the_memory_of_the_whole_svd(ranks: Sequence[int]) -> None:
    parts = [(0.5, adapter(k, r)) for k, r in enumerate(ranks)]
    refactored = algebra.refactor(algebra.stack(parts), 2, dict.fromkeys(SHAPES, 2.0))
    truncated = algebra.truncate(parts[0][1], 1).tensors
    for tensors in (refactored, truncated):
        held = {n: t.untyped_storage().nbytes() - t.nbytes for n, t in tensors.items()}
        assert held == dict.fromkeys(tensors, 0)
        assert all(t.is_contiguous() for t in tensors.values())
