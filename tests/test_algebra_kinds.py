"""The algebra on what is not a plain pair: cores, gains, routers, notes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from conformance.factors import SHAPES, adapter, close, dense, same
from torch import Tensor

from fedllm.adapters import (
    Adapter,
    algebra,
    name_a,
    name_b,
    name_core,
    name_gain,
    name_router,
    note,
)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def full(seed: int, rank: int, scaling: float = 2.0) -> Adapter:
    """Return an adapter with a core on one path and a gain on the other."""
    more = {name_core("q"): drawn(seed, rank, rank), name_gain("v"): drawn(seed, 1)[0]}
    return adapter(seed, rank, scaling).overlaid(more)


def written_out(own: Adapter, path: str) -> Tensor:
    """Return gain * s B core A."""
    if path == "v":
        return own[name_gain("v")] * dense(own, "v")
    return 2.0 * own[name_b("q")] @ own[name_core("q")] @ own[name_a("q")]


def test_a_stack_holds_cores_and_gains() -> None:
    parts = [(1.0, full(1, 3)), (3.0, full(2, 4))]
    stacked, means = algebra.stack(parts), algebra.mean_products(parts)
    for path in SHAPES:
        wanted = written_out(parts[0][1], path) + 3 * written_out(parts[1][1], path)
        assert close(stacked[path].dense(), wanted)
        assert close(means[path].dense(), wanted / 4)


def test_padding_keeps_a_product_with_a_core_and_truncation_undoes_it() -> None:
    own = full(1, 3)
    padded = algebra.pad(own, 5)
    assert padded[name_core("q")].shape == (5, 5)
    assert all(close(padded.product(m).dense(), written_out(own, m)) for m in SHAPES)
    assert algebra.truncate(padded, 3).digest() == own.digest()


def test_cores_of_unequal_rank_are_averaged_over_those_that_have_the_entry() -> None:
    small, large = (Adapter({name_core("q"): drawn(r, r, r)}, {"q": 1.0}) for r in (2, 4))
    got = algebra.mean([(1.0, small), (3.0, large)], large)[name_core("q")]
    wanted = large[name_core("q")].clone()
    wanted[:2, :2] = (small[name_core("q")] + 3 * wanted[:2, :2]) / 4
    assert close(got, wanted)


def test_scalings_change_the_units_of_factors_only() -> None:
    more = {name_router("q"): drawn(1, 3, 14), note("control", name_a("q")): drawn(2, 3, 14)}
    own = Adapter(more, {"q": 8.0})
    assert same(algebra.mean([(1.0, own)], replace(own, scaling={"q": 2.0})), more)
