"""LoRA arithmetic: the only place where low-rank factors are averaged, stacked and factored.

Exact operations come first (`stack`, `pad`); lossy ones say so (`mean` of factors, `refactor`,
`truncate`). No product is formed as (out, in) where its factors do: the singular values of a
stack of total rank R cost two QRs of (out + in) R^2 and one SVD of R x R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedllm.adapters.adapter import Adapter, Product
from fedllm.adapters.lazy import LazyModule
from fedllm.adapters.names import is_a, is_b, is_core, is_note, module_of, name_a, name_b

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

Weighted = Sequence[tuple[float, Adapter]]


def normalised(parts: Weighted) -> list[tuple[float, Adapter]]:
    """Return the parts with weights that sum to 1."""
    total = sum(weight for weight, _ in parts)
    return [(weight / total, adapter) for weight, adapter in parts]


def stack(parts: Weighted) -> dict[str, Product]:
    """Return sum_k w_k s_k B_k A_k of every path, exactly, as one product of rank sum_k r_k.

    Weights and scalings go into A, so unequal ranks and scalings need no care (FLoRA, eq. 4). A
    participant that lacks a path adds nothing to it. A core or gain goes into B.
    """
    return {path: stacked(path, owners) for path, owners in owners_of(parts).items()}


def mean_products(parts: Weighted) -> dict[str, Product]:
    """Return the stack with weights that sum to 1 for each path over those that sent it."""
    return {path: stacked(path, normalised(own)) for path, own in owners_of(parts).items()}


def stacked(path: str, owners: Weighted) -> Product:
    """Return the stack of one path over participants that all have it."""
    b = torch.cat([adapter.product(path).b for _, adapter in owners], dim=1)
    a = [adapter[name_a(path)] * (w * adapter.scaling[path]) for w, adapter in owners]
    return Product(b, torch.cat(a))


def owners_of(parts: Weighted) -> dict[str, list[tuple[float, Adapter]]]:
    """Return the participants that sent each path, with their weights as they are."""
    owners: dict[str, list[tuple[float, Adapter]]] = {}
    for weight, adapter in parts:
        for module in adapter.modules:
            owners.setdefault(module, []).append((weight, adapter))
    return owners


def pad(adapter: Adapter, rank: int) -> Adapter:
    """Return the adapter with zero rows of A and columns of B up to `rank`; the product stays."""
    tensors = {}
    for name, tensor in adapter.tensors.items():
        if is_a(name) or is_core(name):
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))
        if is_b(name) or is_core(name):
            tensor = torch.nn.functional.pad(tensor, (0, rank - tensor.shape[1]))
        tensors[name] = tensor
    return replace(adapter, tensors=tensors)


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """Return the leading `rank` rows of A and columns of B (lossy unless the rest is zero)."""
    tensors = {}
    for name, tensor in adapter.tensors.items():
        if is_a(name):
            tensor = tensor[:rank].clone()
        elif is_b(name):
            tensor = tensor[:, :rank].clone(memory_format=torch.contiguous_format)
        elif is_core(name):
            tensor = tensor[:rank, :rank].clone(memory_format=torch.contiguous_format)
        tensors[name] = tensor
    return replace(adapter, tensors=tensors)


def mean(parts: Weighted, onto: Adapter) -> dict[str, Tensor]:
    """Return the weighted mean of each tensor over the participants that sent it.

    Weights are normalised for each tensor, and for unequal ranks for each rank component, over
    those that own it; a component that nobody sent stays as it is in `onto`. Factors are lossy to
    average: the mean of products is not the product of means. Scalings that differ from `onto`'s
    are first brought to it by sqrt(s_k / s) on both factors, which leaves every product as it is.

    Args:
        parts: Weights and adapters.
        onto: Has the shapes and scalings of the result; not modified.
    """
    names = dict.fromkeys(name for _, adapter in parts for name in adapter)
    return {name: _mean_tensor(name, parts, onto) for name in names}


def _mean_tensor(name: str, parts: Weighted, onto: Adapter) -> Tensor:
    owners = [(weight, adapter) for weight, adapter in parts if name in adapter]
    tensors = [canonical(name, adapter, onto) for _, adapter in owners]
    weights = [weight for weight, _ in owners]
    target = onto[name]
    if all(tensor.shape == target.shape for tensor in tensors):
        total = sum(weights)
        result = torch.zeros_like(target)
        for weight, tensor in zip(weights, tensors, strict=True):
            result = result + tensor * (weight / total)
        return result
    summed, owned = torch.zeros_like(target), torch.zeros_like(target)
    for weight, tensor in zip(weights, tensors, strict=True):
        leading = tuple(slice(length) for length in tensor.shape)
        summed[leading].add_(tensor, alpha=weight)
        owned[leading].add_(weight)
    return torch.where(owned == 0, target, summed / owned)


def canonical(name: str, adapter: Adapter, reference: Adapter) -> Tensor:
    """Return a tensor in the units of `reference`: both factors times sqrt(s_k / s)."""
    if is_note(name) or not (is_a(name) or is_b(name)):
        return adapter[name]
    module = module_of(name)
    ratio = adapter.scaling[module] / reference.scaling[module]
    return adapter[name] if ratio == 1.0 else adapter[name] * ratio**0.5


def refactor(
    products: Mapping[str, Product], rank: int, scaling: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return factors of the best rank-`rank` approximation of every product (lossy beyond it).

    B = U_q S_q / s and A = V_q^T, the split of FlexLoRA's released code, so that s B A is the
    truncated SVD. Below the rank of the product the rest is lost (Eckart-Young); above it A gets
    more orthonormal rows and B zeros.
    """
    tensors = {}
    for module, product in products.items():
        u, s, vh = svd(product, rank)
        tensors[name_a(module)] = fitted(completed(vh, rank), rank, 0)
        tensors[name_b(module)] = fitted(u * (s / scaling[module]), rank, 1)
    return tensors


def completed(rows: Tensor, rank: int) -> Tensor:
    """Add orthonormal rows up to `rank`: with A and B both zero a component could never learn.

    Args:
        rows: Orthonormal, (q, n); not modified.
        rank: How many rows are wanted; n at most can be given.
    """
    count, columns = rows.shape
    wanted = min(rank, columns)
    if count >= wanted:
        return rows
    spare = torch.eye(wanted, columns, dtype=rows.dtype, device=rows.device)
    basis = torch.linalg.qr(torch.cat([rows, spare]).T).Q.T
    return torch.cat([rows, basis[count:wanted]])


def svd(product: Product, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets of `b @ a` without forming it where R is small.

    Returns:
        U (out, q), S (q,), V^T (q, in) with q at most `rank`, R, out and in.
    """
    b, a = product
    if b.shape[1] >= min(b.shape[0], a.shape[1]):
        u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
    else:
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        u, vh = q_b @ u, vh @ q_a.T
    return (u, s, vh) if rank is None else (u[:, :rank], s[:rank], vh[:rank])


def fitted(tensor: Tensor, rank: int, side: int) -> Tensor:
    """Return a contiguous copy with exactly `rank` rows (side 0) or columns (side 1).

    Zeros are added where there are fewer. It is a copy so that it holds on to no larger tensor.
    """
    kept = tensor.narrow(side, 0, min(rank, tensor.shape[side]))
    missing = rank - kept.shape[side]
    kept = torch.nn.functional.pad(kept, (0, 0, 0, missing) if side == 0 else (0, missing))
    return kept.clone(memory_format=torch.contiguous_format)
