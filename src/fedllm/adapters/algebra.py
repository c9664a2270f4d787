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
from fedllm.adapters.names import is_a, is_b, is_head, module_of, name_a, name_b

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
    """Return sum_k w_k s_k B_k A_k of every module, exactly, as one product of rank sum_k r_k.

    Weights and scalings go into A, so unequal ranks and scalings need no care (FLoRA, eq. 4).
    """
    products = {}
    for module in parts[0][1].modules:
        b = torch.cat([adapter[name_b(module)] for _, adapter in parts], dim=1)
        a = torch.cat(
            [adapter[name_a(module)] * (w * adapter.scaling[module]) for w, adapter in parts]
        )
        products[module] = Product(b, a)
    return products


def pad(adapter: Adapter, rank: int) -> Adapter:
    """Return the adapter with zero rows of A and columns of B up to `rank`; the product stays."""
    tensors = {}
    for name, tensor in adapter.tensors.items():
        if is_a(name):
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))
        elif is_b(name):
            tensor = torch.nn.functional.pad(tensor, (0, rank - tensor.shape[1]))
        tensors[name] = tensor
    return replace(adapter, tensors=tensors)


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """Return the leading `rank` rows of A and columns of B (lossy unless the rest is zero)."""
    tensors = {}
    for name, tensor in adapter.tensors.items():
        if is_a(name):
            tensor = tensor[:rank]
        elif is_b(name):
            tensor = tensor[:, :rank]
        tensors[name] = tensor
    return replace(adapter, tensors=tensors)


def mean(parts: Weighted) -> dict[str, Tensor]:
    """Return the weighted mean of each tensor over the participants that sent it.

    Weights are normalised for each tensor, and for unequal ranks for each rank component, over
    those that own it. Factors are lossy to average: the mean of products is not the product of
    means. Unequal scalings are first brought to the first participant's by sqrt(s_k / s) on both
    factors, which leaves every product as it is.
    """
    names = dict.fromkeys(name for _, adapter in parts for name in adapter)
    return {name: _mean_tensor(name, parts) for name in names}


def _mean_tensor(name: str, parts: Weighted) -> Tensor:
    owners = [(weight, adapter) for weight, adapter in parts if name in adapter]
    tensors = [_canonical(name, adapter, owners[0][1]) for _, adapter in owners]
    weights = [weight for weight, _ in owners]
    if is_head(name) or len({t.shape for t in tensors}) == 1:
        total = sum(weights)
        result = torch.zeros_like(tensors[0])
        for weight, tensor in zip(weights, tensors, strict=True):
            result = result + tensor * (weight / total)
        return result
    side = 0 if is_a(name) else 1
    shape = list(tensors[0].shape)
    shape[side] = max(t.shape[side] for t in tensors)
    total_tensor, owned = tensors[0].new_zeros(shape), tensors[0].new_zeros(shape)
    for weight, tensor in zip(weights, tensors, strict=True):
        total_tensor.narrow(side, 0, tensor.shape[side]).add_(tensor, alpha=weight)
        owned.narrow(side, 0, tensor.shape[side]).add_(weight)
    return total_tensor / owned


def _canonical(name: str, adapter: Adapter, reference: Adapter) -> Tensor:
    if is_head(name):
        return adapter[name]
    module = module_of(name)
    ratio = adapter.scaling[module] / reference.scaling[module]
    return adapter[name] if ratio == 1.0 else adapter[name] * ratio**0.5


def refactor(
    products: Mapping[str, Product], rank: int, scaling: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return factors of the best rank-`rank` approximation of every product (lossy beyond it).

    B = U_q S_q / s and A = V_q^T, the split of FlexLoRA's released code, so that s B A is the
    truncated SVD. Below the rank of the product the rest is lost (Eckart-Young); above it the
    factors are zero-padded.
    """
    tensors = {}
    for module, product in products.items():
        u, s, vh = svd(product, rank)
        tensors[name_a(module)] = _fit(vh, rank, 0)
        tensors[name_b(module)] = _fit(u * (s / scaling[module]), rank, 1)
    return tensors


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


def _fit(tensor: Tensor, rank: int, side: int) -> Tensor:
    missing = rank - tensor.shape[side]
    if missing <= 0:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0, 0, missing) if side == 0 else (0, missing))
