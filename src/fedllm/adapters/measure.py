"""Norms of low-rank products and of their sums, from the factors.

A trace formula, tr(B^T B A A^T), loses half of the digits to cancellation: an exact method would
seem wrong by 1e-8. Triangular factors lose none. Everything is computed in fp64, so that what is
measured is the method's rounding. A tensor that has only a shape counts as one of norm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedllm.adapters.adapter import Adapter, Product
from fedllm.adapters.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


def norm(product: Product) -> float:
    """Return the Frobenius norm of b @ a, accurate to rounding relative to the factors."""
    b, a = product
    if b.is_meta or a.is_meta:
        return 1.0
    b, a = b.double(), a.double()
    if b.shape[1] < min(b.shape[0], a.shape[1]):
        b, a = torch.linalg.qr(b).R, torch.linalg.qr(a.T).R.T
    return float((b @ a).norm())


def adapter_norm(adapter: Adapter) -> float:
    """Return the root of the sum over paths of ||s B core A||_F^2."""
    return math.hypot(*(norm(adapter.product(path)) for path in adapter.modules))


def inner(one: Product, other: Product) -> float:
    """Return the Frobenius inner product <b a, d c>, which is the sum of (b^T d) * (a c^T)."""
    if any(tensor.is_meta for tensor in (*one, *other)):
        return 1.0
    b, a, d, c = (tensor.double() for tensor in (*one, *other))
    return float(((b.T @ d) * (a @ c.T)).sum())


def difference_norm(layers: Mapping[str, Sequence[Product | Tensor]]) -> float:
    """Return the root of the sum over layers of || the sum of what is given for a layer ||_F^2.

    A layer's terms are products and dense (out, in) matrices, signs inside; they are stacked where
    that is the smaller way, and summed as matrices otherwise.
    """
    return math.hypot(*(_sum_norm(terms) for terms in layers.values() if terms))


def _sum_norm(terms: Sequence[Product | Tensor]) -> float:
    products = [term for term in terms if isinstance(term, Product)]
    matrices = [term for term in terms if not isinstance(term, Product)]
    if any(tensor.is_meta for tensor in (*matrices, *(t for pair in products for t in pair))):
        return 1.0
    if not matrices:
        b = torch.cat([product.b.double() for product in products], dim=1)
        a = torch.cat([product.a.double() for product in products])
        return norm(Product(b, a))  # forms the matrix by itself where the stack is the larger
    total = torch.zeros_like(matrices[0], dtype=torch.float64)
    for matrix in matrices:
        total += matrix
    for product in products:
        total.addmm_(product.b.double(), product.a.double())
    return float(total.norm())
