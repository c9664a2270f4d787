"""Sparse changes of whole weights, and the low-rank adapter that continues one (SLoRA)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedllm.adapters.adapter import Adapter, Product
from fedllm.adapters.algebra import refactor
from fedllm.adapters.lazy import LazyModule
from fedllm.adapters.names import (
    is_head,
    is_values,
    layer_of,
    name_a,
    name_b,
    name_index,
    name_values,
)
from fedllm.seeding import rng

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


def sparse_start(adapter: Adapter, density: float, seed: int) -> Adapter:
    """Return a sparse change of zeros in the place of every path; heads and scalings stay.

    Args:
        adapter: Gives layers and shapes; not modified.
        density: Share of each weight's entries that may change, in (0, 1]; one entry at least.
        seed: The same seed gives the same places.
    """
    tensors = dict(adapter.select(is_head).tensors)
    shapes: dict[str, tuple[int, int]] = {}
    for layer in adapter.modules:
        a = adapter[name_a(layer)]
        rows, columns = shapes[layer] = (adapter[name_b(layer)].shape[0], a.shape[1])
        count = max(1, round(density * rows * columns))
        tensors[name_index(layer)] = _places(a, rows * columns, count, seed, layer)
        tensors[name_values(layer)] = a.new_zeros(count)
    return replace(adapter, tensors=tensors, shapes=shapes)


def _places(like: Tensor, size: int, count: int, seed: int, layer: str) -> Tensor:
    """Draw places without replacement, ascending: int64 (count,)."""
    if like.is_meta:
        return torch.empty(count, dtype=torch.int64, device="meta")
    drawn = rng(seed, "mask", layer).choice(size, count, replace=False, shuffle=False)
    drawn.sort()
    return torch.from_numpy(drawn).to(like.device, torch.int64)


def continued(adapter: Adapter, rank: int) -> Adapter:
    """Return the best low-rank adapter in the place of every sparse change (lossy beyond `rank`).

    s B A is the truncated SVD of the change, split as `algebra.refactor` does.
    """
    layers = [layer_of(name) for name in adapter if is_values(name)]
    products = {}
    for layer in layers:
        dense = adapter.sparse(layer)
        # whatever has `in` columns is factored as the dense matrix that it is
        identity = torch.eye(dense.shape[1], dtype=dense.dtype, device=dense.device)
        products[layer] = Product(dense, identity)
    heads = adapter.select(is_head).tensors
    return replace(
        adapter, tensors={**refactor(products, rank, adapter.scaling), **heads}, shapes={}
    )
