"""Rotations of factors and corrections of B, against dense matrices and autograd."""

from __future__ import annotations

from typing import Literal

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
    same,
    seeds,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.adapters import Adapter, Product, algebra, name_a, name_b, name_core
from fedllm.adapters.alignment import (
    change_of_basis,
    cosine_correction,
    ridge_correction,
    rotated,
)

Side = Literal["a", "b"]
sides = st.sampled_from(["a", "b"])
strengths = st.sampled_from([0.2, 0.5, 0.8, 1.0, 1.5])


def rotation(seed: int, rank: int, proper: bool = True) -> Tensor:
    """Draw an orthogonal matrix; of determinant -1 if not proper."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(rank, rank)))[0]
    if (np.linalg.det(q) > 0) != proper:
        q[:, 0] *= -1
    return torch.from_numpy(q)


def turned(own: Adapter, turn: Tensor) -> Adapter:
    """Return T A, B T^T: the same product in other factors."""
    a = {name_a(m): turn @ own[name_a(m)] for m in SHAPES}
    return own.overlaid({**a, **{name_b(m): own[name_b(m)] @ turn.T for m in SHAPES}})


def applied(before: Adapter, after: Adapter, path: str) -> Tensor:
    """Return the R that was applied, from R^T A and A."""
    return (after[name_a(path)] @ torch.linalg.pinv(before[name_a(path)])).T


def distance(one: Adapter, other: Adapter, path: str, side: Side) -> float:
    """Return how far two factors are from one another."""
    name = name_a(path) if side == "a" else name_b(path)
    return float((one[name] - other[name]).norm())


# rotations


@quick
@given(seeds, st.integers(1, 6), sides, strengths, st.booleans())
def test_a_rotation_keeps_the_product_and_is_orthogonal(
    seed: int, rank: int, side: Side, strength: float, proper: bool
) -> None:
    own, reference = adapter(seed, rank), adapter(seed + 7, rank)
    new = rotated(own, reference, side, strength, proper)
    for path in SHAPES:
        assert close(dense(new, path), dense(own, path))
        turn = applied(own, new, path)
        assert close(turn.T @ turn, torch.eye(rank, dtype=turn.dtype), 1e-7)
        if proper:
            assert float(torch.linalg.det(turn)) == pytest.approx(1.0)


@quick
@given(seeds, st.integers(1, 6), sides, st.booleans())
def test_a_full_rotation_never_leads_away_from_the_reference(
    seed: int, rank: int, side: Side, proper: bool
) -> None:
    own, reference = adapter(seed, rank), adapter(seed + 7, rank)
    new = rotated(own, reference, side, 1.0, proper)
    for path in SHAPES:
        assert distance(new, reference, path, side) <= distance(own, reference, path, side) + 1e-9


@quick
@given(seeds, st.integers(2, 6), sides, st.booleans())
def test_a_pure_rotation_is_undone(seed: int, rank: int, side: Side, proper: bool) -> None:
    own = adapter(seed, rank)
    new = rotated(turned(own, rotation(seed, rank, proper)), own, side, 1.0, proper)
    assert same(new.tensors, own.tensors)


def test_only_an_improper_alignment_undoes_a_reflection() -> None:
    own = adapter(1, 3)
    mirrored = turned(own, rotation(1, 3, proper=False))
    assert distance(rotated(mirrored, own, "a", 1.0, True), own, "q", "a") > 0.1
    assert distance(rotated(mirrored, own, "a", 1.0, False), own, "q", "a") < 1e-9


def test_strength_zero_leaves_every_tensor_as_it_is() -> None:
    own = adapter(1, 3)
    assert rotated(own, adapter(2, 3), "a", 0.0).digest() == own.digest()


def test_a_soft_rotation_by_a_small_angle_is_the_share_of_the_angle() -> None:
    angle = 0.02
    turn = torch.tensor(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=torch.float64
    )
    own = adapter(1, 2)
    new = rotated(turned(own, turn), own, "a", 0.25)
    back = applied(turned(own, turn), new, "q")
    assert float(torch.atan2(back[1, 0], back[0, 0])) == pytest.approx(angle * 0.25, rel=1e-3)


def test_a_half_turn_at_half_strength_is_taken_in_full() -> None:
    own = adapter(1, 3)
    half = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    new = rotated(turned(own, half), own, "a", 0.5)
    assert same(new.tensors, own.tensors)


def test_clients_that_differ_by_rotations_average_exactly_once_aligned() -> None:
    own, reference = adapter(1, 3), adapter(2, 3)
    shares = (0.1, 0.2, 0.3, 0.4)
    apart = [(w, turned(own, rotation(k, 3))) for k, w in enumerate(shares)]
    aligned = [(w, rotated(one, reference, "a", 1.0)) for w, one in apart]
    for parts, is_exact in ((apart, False), (aligned, True)):
        mean = Adapter(mean_of(parts), own.scaling)
        assert (float((dense(mean, "q") - dense(own, "q")).norm()) < 1e-9) == is_exact


def test_a_reference_of_zeros_or_without_the_path_turns_nothing() -> None:
    own = adapter(1, 3)
    zeros = own.overlaid({name_b(m): torch.zeros_like(own[name_b(m)]) for m in SHAPES})
    assert same(rotated(own, zeros, "b", 1.0).tensors, own.tensors)
    assert rotated(own, own.select(lambda _: False), "a", 1.0).digest() == own.digest()


@pytest.mark.parametrize("rank", [2, 5])
def test_a_reference_of_another_rank_is_brought_to_the_adapters(rank: int) -> None:
    own, reference = adapter(1, 3), adapter(2, rank)
    fitting = algebra.truncate(algebra.pad(reference, 5), 3)
    for side in ("a", "b"):
        new = rotated(own, reference, side, 1.0)
        assert same(new.tensors, rotated(own, fitting, side, 1.0).tensors)
        assert all(close(dense(new, m), dense(own, m)) for m in SHAPES)


def test_a_core_turns_with_its_factors() -> None:
    core = torch.from_numpy(np.random.default_rng(5).normal(size=(3, 3)))
    own = adapter(1, 3).overlaid({name_core("q"): core})
    new = rotated(own, adapter(2, 3), "a", 0.7)
    assert close(new.product("q").dense(), own.product("q").dense())
    assert not close(new[name_a("q")], own[name_a("q")])


def test_a_rotation_in_single_precision_keeps_the_product() -> None:
    own, reference = adapter(1, 3, dtype=torch.float32), adapter(2, 3, dtype=torch.float32)
    new = rotated(own, reference, "b", 0.5)
    assert new[name_a("q")].dtype == torch.float32
    assert all(close(dense(new, m), dense(own, m), 1e-5) for m in SHAPES)


# another basis


@quick
@given(seeds, st.integers(1, 6), st.booleans())
def test_a_change_of_basis_is_exact_where_row_spaces_agree(
    seed: int, rank: int, is_orthonormal: bool
) -> None:
    then = adapter(seed, rank)
    b, a = adapter(seed + 7, rank)[name_b("q")], then[name_a("q")]
    now = torch.linalg.qr(a.T).Q.T if is_orthonormal else rotation(seed, rank) @ a * 3.0
    mapped = change_of_basis(b, a, now)
    assert close(mapped @ now, b @ a)
    if is_orthonormal:
        assert close(mapped, b @ a @ now.T)


# corrections of B


def averaged(parts: Parts) -> tuple[dict[str, Product], Adapter]:
    """Return the wanted products and the pair of means."""
    return algebra.mean_products(parts), Adapter(mean_of(parts), parts[0][1].scaling)


def error(wanted: Tensor, pair: Adapter, path: str) -> float:
    """Return how far s B A is from what is wanted."""
    return float((wanted - dense(pair, path)).norm())


@quick
@given(cohorts(ranks=st.integers(1, 6)), st.sampled_from([0.0, 1e-10, 0.01, 1.0, 100.0]))
def test_a_ridge_correction_is_its_closed_form_and_never_worse(
    parts: Parts, strength: float
) -> None:
    products, mean = averaged(parts)
    tensors = ridge_correction(products, mean, strength)
    new = mean.overlaid(tensors)
    total = sum(w for w, _ in parts)
    assert set(tensors) == {name_b(m) for m in SHAPES}
    for path in SHAPES:
        a, b, s = mean[name_a(path)], mean[name_b(path)], mean.scaling[path]
        wanted = dense_sum(parts, path) / total
        assert error(wanted, new, path) <= error(wanted, mean, path) + 1e-9
        if strength < 0.01:
            assert close(dense(new, path), wanted @ torch.linalg.pinv(a) @ a, 1e-6)
        else:
            gram = a @ a.T + strength * torch.eye(len(a), dtype=a.dtype)
            closed = b + (wanted / s - b @ a) @ a.T @ torch.linalg.inv(gram)
            assert close(new[name_b(path)], closed)


def test_a_strong_ridge_is_no_correction() -> None:
    products, mean = averaged([(1.0, adapter(1, 3)), (2.0, adapter(2, 3))])
    for name, tensor in ridge_correction(products, mean, 1e15).items():
        assert close(tensor, mean[name])


@pytest.mark.parametrize("correct", ["ridge", "cosine"])
def test_identical_clients_need_no_correction(correct: str) -> None:
    own = adapter(1, 3)
    products, mean = averaged([(0.3, own), (0.7, own)])
    tensors = (
        ridge_correction(products, mean, 0.01)
        if correct == "ridge"
        else cosine_correction(products, mean, 0.01, 50, 0.5)
    )
    assert all(close(tensors[name], own[name]) for name in tensors)


def test_a_ridge_without_strength_bears_a_dead_component() -> None:
    products, mean = averaged([(1.0, adapter(1, 3)), (2.0, adapter(2, 3))])
    a = mean[name_a("q")].clone()
    a[1] = 0
    dead = mean.overlaid({name_a("q"): a})
    b = ridge_correction(products, dead, 0.0)[name_b("q")]
    wanted = products["q"].dense() @ torch.linalg.pinv(a) @ a
    assert close(2.0 * b @ a, wanted)


def objective(wanted: Tensor, change: Tensor, mean: Adapter, strength: float) -> Tensor:
    """Return 1 - cos(M, (B + dB) A) + strength ||dB||, by the matrices."""
    got = (mean[name_b("q")] + change) @ mean[name_a("q")]
    return 1 - (wanted * got).sum() / wanted.norm() / got.norm() + strength * change.norm()


def test_one_step_follows_the_gradient_of_the_cosine() -> None:
    products, mean = averaged([(1.0, adapter(1, 3)), (2.0, adapter(2, 3))])
    change = torch.zeros_like(mean[name_b("q")], requires_grad=True)
    objective(products["q"].dense(), change, mean, 0.0).backward()  # type: ignore[no-untyped-call]
    got = cosine_correction(products, mean, 0.0, 1, 0.3)[name_b("q")]
    assert change.grad is not None
    assert close(got - mean[name_b("q")], -0.3 * change.grad)


@pytest.mark.parametrize("strength", [0.0, 0.01])
def test_steps_lower_the_objective(strength: float) -> None:
    parts = [(1.0, adapter(1, 3)), (2.0, adapter(2, 3))]
    products, mean = averaged(parts)
    wanted, values = products["q"].dense(), []
    for steps in (0, 1, 5, 50):
        b = cosine_correction(products, mean, strength, steps, 0.5)[name_b("q")]
        values.append(float(objective(wanted, b - mean[name_b("q")], mean, strength)))
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] - 0.01


def test_a_distance_that_weighs_more_than_the_slope_keeps_b() -> None:
    products, mean = averaged([(1.0, adapter(1, 3)), (2.0, adapter(2, 3))])
    tensors = cosine_correction(products, mean, 100.0, 20, 0.5)
    assert all(torch.equal(tensors[name], mean[name]) for name in tensors)


def test_nothing_points_nowhere() -> None:
    own = adapter(1, 3)
    zeros = own.overlaid({name_b(m): torch.zeros_like(own[name_b(m)]) for m in SHAPES})
    for wanted, pair in ((own, zeros), (zeros, own)):
        products = {m: wanted.product(m) for m in SHAPES}
        tensors = cosine_correction(products, pair, 0.01, 3, 0.5)
        assert all(torch.equal(tensors[name], pair[name]) for name in tensors)
