"""Increments of the base weights: their sum, their size, and what a client must download."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from conformance.factors import (
    SHAPES,
    adapter,
    close,
    quick,
    seeds,
)
from hypothesis import given
from hypothesis import strategies as st

from fedllm.adapters import BaseDelta, Product, algebra


def increments(ranks: Sequence[int], seed: int = 0) -> list[dict[str, Product]]:
    """Return one increment a rank."""
    return [algebra.stack([(0.7, adapter(seed + k, r))]) for k, r in enumerate(ranks)]


def total_bytes(product: Product) -> int:
    """Return what two factors take."""
    return product.b.nbytes + product.a.nbytes


@quick
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), seeds)
def test_what_was_merged_is_the_dense_sum(ranks: list[int], seed: int) -> None:
    delta = BaseDelta()
    for version, increment in enumerate(increments(ranks, seed), start=1):
        delta = delta.merged(version, increment)
    factors = delta.as_products()
    for module, (rows, columns) in SHAPES.items():
        wanted = torch.stack([inc[module].dense() for inc in increments(ranks, seed)]).sum(dim=0)
        assert close(factors[module].dense(), wanted)
        assert factors[module].b.shape[1] <= min(rows, columns)
        stored = module in delta.dense
        assert stored == (sum(ranks) * (rows + columns) > rows * columns)
        assert stored != (module in delta.products)
    assert delta.version == len(ranks)


@quick
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_a_client_downloads_what_it_lacks_or_the_sum_where_that_is_smaller(
    ranks: list[int],
) -> None:
    delta, sizes = BaseDelta(), []
    for version, increment in enumerate(increments(ranks), start=1):
        delta = delta.merged(version, increment)
        sizes.append(sum(total_bytes(p) for p in increment.values()))
    numbers = sum(min(sum(ranks) * (o + i), o * i) for o, i in SHAPES.values())
    for since in range(-1, len(ranks) + 1):
        missing = sum(sizes[max(since, 0) :])
        assert delta.nbytes_since(since) == min(missing, 8 * numbers)
    assert delta.nbytes_since(len(ranks)) == 0


def test_merging_leaves_the_earlier_delta_as_it_was() -> None:
    first, second, third = increments((2, 3, 6))
    one = BaseDelta().merged(1, first)
    kept = {m: p.dense().clone() for m, p in one.as_products().items()}
    two = one.merged(2, second).merged(3, third)
    assert one.version == 1
    assert two.version == 3
    assert all(torch.equal(p.dense(), kept[m]) for m, p in one.as_products().items())
    assert BaseDelta().version == -1
    assert BaseDelta().nbytes_since(-1) == 0


def test_small_increments_survive_that_a_bf16_weight_would_lose() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=draw)
    rounded = weight.to(torch.bfloat16)
    lost = (rounded * (1 + 1e-3)).to(torch.bfloat16) == rounded
    assert float(lost.float().mean()) > 0.9
    delta = BaseDelta()
    for version in range(1, 4):
        delta = delta.merged(version, {"m": Product(1e-3 * weight, torch.eye(64))})
    (product,) = delta.as_products().values()
    assert close(product.dense(), 3e-3 * weight, 1e-6)
