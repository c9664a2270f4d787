"""Norms and inner products of low-rank matrices, against the matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance.factors import SHAPES, adapter, dense, quick, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.adapters import Adapter, Product, name_core, name_gain
from fedllm.adapters.measure import adapter_norm, difference_norm, inner, norm


def product(seed: int, rank: int, shape: tuple[int, int] = (20, 14)) -> Product:
    """Draw a product."""
    draw = np.random.default_rng(seed)
    b, a = draw.normal(size=(shape[0], rank)), draw.normal(size=(rank, shape[1]))
    return Product(torch.from_numpy(b), torch.from_numpy(a))


@quick
@given(seeds, st.integers(1, 30), st.sampled_from([(20, 14), (14, 20)]))
def test_a_norm_is_that_of_the_matrix(seed: int, rank: int, shape: tuple[int, int]) -> None:
    one = product(seed, rank, shape)
    assert norm(one) == pytest.approx(float(one.dense().norm()), rel=1e-12)


def test_a_difference_that_is_rounding_measures_as_rounding() -> None:
    b, a = product(1, 3, (200, 100))
    turn = torch.linalg.qr(torch.from_numpy(np.random.default_rng(2).normal(size=(3, 3)))).Q
    same = Product(torch.cat([b, -(b @ turn)], dim=1), torch.cat([a, turn.T @ a]))
    assert 0 < norm(same) < 1e-14 * norm(Product(b, a))
    traced = (same.b.T @ same.b * (same.a @ same.a.T)).sum()  # what a trace formula would say
    assert abs(float(traced)) ** 0.5 > 1e-12 * norm(Product(b, a))


def test_single_precision_is_measured_in_double() -> None:
    b, a = (t.float() for t in product(1, 3))
    assert norm(Product(b, a)) == pytest.approx(
        float((b.double() @ a.double()).norm()), rel=1e-13, abs=0
    )


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 5))
def test_an_inner_product_is_that_of_the_matrices(seed: int, rank: int, other: int) -> None:
    one, two = product(seed, rank), product(seed + 1, other)
    assert inner(one, two) == pytest.approx(float((one.dense() * two.dense()).sum()), abs=1e-9)


def test_the_norm_of_an_adapter_counts_scalings_cores_and_gains() -> None:
    core = torch.from_numpy(np.random.default_rng(5).normal(size=(3, 3)))
    gain = torch.tensor(0.5, dtype=torch.float64)
    own = adapter(1, 3).overlaid({name_core("q"): core, name_gain("v"): gain})
    q = 2.0 * own["q.lora_B"] @ core @ own["q.lora_A"]
    v = 0.5 * dense(own, "v")
    wanted = float((q.square().sum() + v.square().sum()).sqrt())
    assert adapter_norm(own) == pytest.approx(wanted)
    assert adapter_norm(Adapter({})) == 0.0


@quick
@given(seeds, st.lists(st.sampled_from([0, 1, 3, 9, 20]), min_size=1, max_size=4))
def test_a_difference_adds_products_and_matrices(seed: int, ranks: list[int]) -> None:
    layers: dict[str, list[Product | Tensor]] = {}
    total = 0.0
    for layer, shape in SHAPES.items():
        terms: list[Product | Tensor] = []
        summed = torch.zeros(shape, dtype=torch.float64)
        for k, rank in enumerate(ranks):
            one = product(seed + k, rank or 2, shape)
            terms.append(one if rank else one.dense())  # 0 stands for a dense one
            summed += one.dense()
        layers[layer] = terms
        total += float(summed.square().sum())
    assert difference_norm(layers) == pytest.approx(total**0.5, rel=1e-12)


def test_a_difference_of_nothing_is_zero() -> None:
    one = product(1, 3)
    assert difference_norm({}) == difference_norm({"q": []}) == 0.0
    assert difference_norm({"q": [one, Product(-one.b, one.a)]}) < 1e-14 * norm(one)
    assert difference_norm({"q": [one, -one.dense()]}) < 1e-14 * norm(one)


def test_a_shape_alone_counts_as_one() -> None:
    shape = Product(*(t.to("meta") for t in product(1, 3)))
    assert norm(shape) == inner(shape, product(1, 2)) == difference_norm({"q": [shape]}) == 1.0
    assert difference_norm({"q": [product(1, 2), torch.empty(20, 14, device="meta")]}) == 1.0
