"""Named tensors as a flat vector, and the mean of padded tensors."""

from __future__ import annotations

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
    mean_of,
    quick,
    same,
    seeds,
)
from hypothesis import given
from hypothesis import strategies as st

from fedllm.adapters import Adapter, algebra, name_a, name_b
from fedllm.adapters.linear import (
    add,
    flat_norm,
    mean_padded,
    scale,
    subtract,
    truncated_to,
    zeros_like,
)

X = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
Y = {"a": torch.tensor([10.0, 20.0]), "c": torch.tensor([7.0])}


def test_sums_have_the_names_of_the_first_and_take_missing_ones_as_zero() -> None:
    assert same(add(X, Y), {"a": torch.tensor([11.0, 22.0]), "b": X["b"]})
    assert same(add(X, Y, 0.5), {"a": torch.tensor([6.0, 12.0]), "b": X["b"]})
    assert same(subtract(X, Y), {"a": torch.tensor([-9.0, -18.0]), "b": X["b"]})
    assert same(scale(X, -2.0), {"a": torch.tensor([-2.0, -4.0]), "b": torch.tensor([[-6.0]])})
    assert same(zeros_like(X), {"a": torch.zeros(2), "b": torch.zeros(1, 1)})


def test_the_flat_norm_is_that_of_all_entries_together() -> None:
    assert flat_norm(X) == pytest.approx(14**0.5)
    assert flat_norm({}) == 0.0
    assert flat_norm({"a": torch.empty(3, device="meta")}) == 1.0


@quick
@given(seeds, st.integers(1, 4), st.integers(0, 4))
def test_truncation_undoes_padding_and_owns_its_memory(seed: int, rank: int, more: int) -> None:
    own = adapter(seed, rank)
    back = truncated_to(algebra.pad(own, rank + more).tensors, own.tensors)
    assert Adapter(back, own.scaling).digest() == own.digest()
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in back.values())


def test_truncation_leaves_out_what_the_smaller_one_lacks() -> None:
    own = adapter(1, 3)
    assert set(truncated_to(own.tensors, {HEAD: own[HEAD]})) == {HEAD}


# the mean of padded tensors


def zeros(parts: Parts) -> Adapter:
    """Return zeros of the largest rank, in the first participant's scaling."""
    largest = max(own.rank for _, own in parts)
    padded = algebra.pad(adapter(0, 1), largest)
    return Adapter(zeros_like(padded.tensors), parts[0][1].scaling)


@quick
@given(cohorts(weight=st.floats(0.1, 5.0)))
def test_the_mean_of_padded_tensors_counts_missing_components_as_zero(parts: Parts) -> None:
    onto = zeros(parts)
    got = mean_padded(parts, onto)
    total = sum(w for w, _ in parts)
    for path in SHAPES:
        for name in (name_a(path), name_b(path)):
            terms = [
                w
                / total
                * (one.scaling[path] / onto.scaling[path]) ** 0.5
                * algebra.pad(one, onto.rank)[name]
                for w, one in parts
            ]
            assert close(got[name], torch.stack(terms).sum(dim=0))


@quick
@given(cohorts(ranks=st.just(3)))
def test_without_padding_it_is_the_mean(parts: Parts) -> None:
    assert same(mean_padded(parts, zeros(parts)), mean_of(parts))


def test_padding_keeps_each_product_but_the_mean_is_not_that_of_products() -> None:
    parts = [(w, adapter(k, r, 16 / r)) for k, (w, r) in enumerate(((0.5, 2), (0.3, 3), (0.2, 4)))]
    onto = zeros(parts)
    alone = Adapter(mean_padded(parts[1:2], onto), onto.scaling)
    assert all(close(dense(alone, m), dense(parts[1][1], m)) for m in SHAPES)
    mixed = Adapter(mean_padded(parts, onto), onto.scaling)
    wanted = dense_sum(parts, "q")
    assert float((dense(mixed, "q") - wanted).norm()) > 1e-2 * float(wanted.norm())


def test_a_tensor_that_one_lacks_is_averaged_over_the_others() -> None:
    one, two = adapter(1, 3), adapter(2, 3)
    lacking = two.select(lambda name: name.startswith("v."))
    got = mean_padded([(1.0, one), (3.0, lacking)], zeros([(1.0, one)]))
    assert close(got[name_b("q")], one[name_b("q")])
    assert close(got[name_b("v")], (one[name_b("v")] + 3 * two[name_b("v")]) / 4)
    assert close(got[HEAD], one[HEAD])


def test_a_component_beyond_the_rank_of_all_stays_as_it_is() -> None:
    onto, one, two = adapter(1, 5), adapter(2, 2), adapter(3, 3)
    got = mean_padded([(1.0, one), (3.0, two)], onto)
    a, b = name_a("q"), name_b("q")
    assert torch.equal(got[a][3:], onto[a][3:])
    assert torch.equal(got[b][:, 3:], onto[b][:, 3:])
    assert close(got[a][2], 0.75 * two[a][2])
