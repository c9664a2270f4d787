"""Ways to split a product into factors of a given rank, and what a split leaves over.

Every split has s B A as near to the product as its method allows, and always gives tensors of the
asked rank. Where the product has less than that, one of the two factors is orthonormal there and
the other zero, so that the component adds nothing but can learn. `algebra.refactor` is the split
of FlexLoRA and FedSVD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedllm.adapters.adapter import Adapter, Product
from fedllm.adapters.algebra import (
    Weighted,
    canonical,
    completed,
    fitted,
    normalised,
    owners_of,
    stacked,
    svd,
)
from fedllm.adapters.lazy import LazyModule
from fedllm.adapters.names import is_on_path, name_a, name_b, name_core, name_gain

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


def qr_split(
    products: Mapping[str, Product], rank: int, scaling: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return B = Q[:, :r] and A = R[:r] / s of the unpivoted QR of every product (ILoRA).

    The first r columns of the product are kept exactly, the others projected on their span: a
    worse approximation than an SVD of the same rank, and even at the rank of the product exact
    only if its first r columns are independent.
    """
    tensors: dict[str, Tensor] = {}
    for path, (b, a) in products.items():
        count = min(rank, b.shape[0], a.shape[1])
        q, r = torch.linalg.qr(b @ a[:, :count])
        rows = torch.cat([r, (q.T @ b) @ a[:, count:]], dim=1) / scaling[path]
        tensors |= _orthonormal_b(path, q, rows, rank)
    return tensors


def leading_qr(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return Q[:, :r] (out, r) and R[:r] (r, in) of the unpivoted QR of a dense matrix.

    Half precision is raised to fp32 first. A rank beyond the matrix gives more orthonormal
    columns in Q and zeros in R.
    """
    dense = weight.float() if weight.element_size() < 4 else weight
    count = min(rank, *dense.shape)
    q, r = torch.linalg.qr(dense[:, :count])
    rows = torch.cat([r, q.T @ dense[:, count:]], dim=1)
    return fitted(completed(q.T, rank).T, rank, 1), fitted(rows, rank, 0)


def qr_start(adapter: Adapter, weight_of: Callable[[str], Tensor], slot: str) -> Adapter:
    """Return the adapter that begins with the QR factors of its weights (ILoRA).

    Every path gets B = Q[:, :r] and A = R[:r], and beside it, in `slot`, the same factors with
    scaling -s: together they add nothing to W until the path is trained.

    Args:
        adapter: Gives paths, rank and scalings; not modified.
        weight_of: Layer to its weight (out, in).
        slot: Name of the second path of each layer.
    """
    tensors: dict[str, Tensor] = {}
    for path in adapter.modules:
        like = adapter[name_a(path)]
        q, r = leading_qr(weight_of(path), adapter.rank_of(path))
        tensors |= {name_a(path): r.to(like), name_b(path): q.to(like)}
    start = adapter.overlaid(tensors)
    shift = start.select(is_on_path).moved(slot)
    return start.joined(replace(shift, scaling={p: -s for p, s in shift.scaling.items()}))


def orthonormal_split(
    products: Mapping[str, Product], rank: int, scaling: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return B = U_r and A = S_r V_r^T / s of the truncated SVD of every product (HiLoRA)."""
    tensors: dict[str, Tensor] = {}
    for path, product in products.items():
        u, s, vh = svd(product, rank)
        tensors |= _orthonormal_b(path, u, vh * (s / scaling[path])[:, None], rank)
    return tensors


def _orthonormal_b(path: str, columns: Tensor, rows: Tensor, rank: int) -> dict[str, Tensor]:
    b = completed(columns.T, rank).T
    return {name_a(path): fitted(rows, rank, 0), name_b(path): fitted(b, rank, 1)}


def balanced_split(
    products: Mapping[str, Product], rank: int, scaling: Mapping[str, float], energy: float
) -> tuple[dict[str, Tensor], dict[str, Product]]:
    """Return factors that share the singular values evenly, and a residual (FedMomentum).

    B = U_r sqrt(S_r / s) and A = sqrt(S_r / s) V_r^T, so that s B A is the truncated SVD. The
    components r < j <= r_eff are the residual, where r_eff is the smallest rank whose components
    hold `energy` of the sum of squares; what is beyond both is lost.

    Args:
        products: Path to what is split, scalings inside; not modified.
        rank: Rank r of the factors.
        scaling: Path to s.
        energy: Share in (0, 1]; 1 keeps all that exceeds rounding.

    Returns:
        The factors by name, and what to add to W by path: the scaling is inside it already, and a
        path is absent where nothing is left.
    """
    tensors: dict[str, Tensor] = {}
    residual: dict[str, Product] = {}
    for path, product in products.items():
        u, s, vh = svd(product)
        alive = min(rank, _effective_rank(s, 1.0))
        root = (s[:alive] / scaling[path]).sqrt()
        a = completed(vh[:alive], rank).clone()
        a[:alive] *= root[:, None]
        tensors[name_a(path)] = fitted(a, rank, 0)
        tensors[name_b(path)] = fitted(u[:, :alive] * root, rank, 1)
        rest = slice(rank, _effective_rank(s, energy))
        if rest.stop > rank:
            residual[path] = Product(_own(u[:, rest]), (vh[rest] * s[rest, None]).contiguous())
    return tensors, residual


def _effective_rank(s: Tensor, energy: float) -> int:
    """Return how many singular values hold `energy` of the sum of squares, up to rounding."""
    if s.is_meta:
        return len(s)  # shapes alone tell the most that can be needed
    squares = s.double().square()
    tails = squares.flip(0).cumsum(0).flip(0)  # small ones first: a tail is exact to rounding
    rounding = 4 * torch.finfo(s.dtype).eps * len(s) ** 0.5
    allowed = max(1.0 - energy, rounding**2) * tails[0]
    return int((tails > allowed).sum())


def residual(parts: Weighted, onto: Adapter, rank: int | None = None) -> dict[str, Product]:
    """Return sum_k p_k s_k B_k A_k - s B A of every path: what the stored pair misses (FedEx-LoRA).

    Where B and A are the means of factors of one rank it is s sum_{k<K} p_k (B_k - B)(A_k - A_K),
    of rank (K-1) r and without cancellation; otherwise the stack of all products. A path where
    nothing is missing, as with one participant, is absent.

    Args:
        parts: Weights, brought to a sum of 1 for each path over its owners, and adapters.
        onto: The pair (A, B) that is sent to everyone; not modified.
        rank: Truncate to this rank by SVD (lossy); None keeps all.
    """
    left = {}
    for path, own in owners_of(parts).items():
        owners = normalised(own)
        found = _deviations(path, owners, onto)
        if found is None:
            found = stacked(path, [*owners, (-1.0, onto)])
        if rank is not None and found.a.shape[0] > rank:
            u, s, vh = svd(found, rank)
            found = Product((u * s).contiguous(), _own(vh))
        if found.a.shape[0]:
            left[path] = found
    return left


def _deviations(path: str, owners: Weighted, onto: Adapter) -> Product | None:
    """Return the residual from deviations of the mean; None where `onto` is not the mean."""
    a, b = name_a(path), name_b(path)
    if any(name in one for _, one in owners for name in (name_core(path), name_gain(path))):
        return None
    own_a = [canonical(a, one, onto) for _, one in owners]
    own_b = [canonical(b, one, onto) for _, one in owners]
    shares = [share for share, _ in owners]
    if not (_is_mean(onto[a], own_a, shares) and _is_mean(onto[b], own_b, shares)):
        return None
    scaling = onto.scaling[path]
    columns = [each - onto[b] for each in own_b[:-1]]
    rows = [
        (each - own_a[-1]) * (share * scaling) for share, each in zip(shares, own_a, strict=True)
    ][:-1]
    if not rows:
        return Product(onto[b][:, :0], onto[a][:0])
    return Product(torch.cat(columns, dim=1), torch.cat(rows))


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _is_mean(mean: Tensor, tensors: Sequence[Tensor], shares: Sequence[float]) -> bool:
    if any(tensor.shape != mean.shape for tensor in tensors):
        return False
    if mean.is_meta:
        return True
    gap = mean.clone()
    size = mean.norm()
    for share, tensor in zip(shares, tensors, strict=True):
        gap -= tensor * share
        size = size + tensor.norm() * abs(share)
    return bool(gap.norm() <= 8 * torch.finfo(mean.dtype).eps * size)
