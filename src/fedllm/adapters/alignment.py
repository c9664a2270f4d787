"""Corrections of factors before or after they are averaged: rotations, and a better B.

Everything is computed in the r-dimensional space of the factors; no (out, in) matrix is formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from fedllm.adapters.adapter import Adapter, Product
from fedllm.adapters.algebra import fitted
from fedllm.adapters.lazy import LazyModule
from fedllm.adapters.names import name_a, name_b, name_core

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


def rotated(
    adapter: Adapter,
    reference: Adapter,
    side: Literal["a", "b"],
    strength: float,
    proper: bool = True,
) -> Adapter:
    """Return the adapter with R^T A and B R, turned towards a reference (FedRot-LoRA).

    The product stays as it is. R* = U diag(1, .., 1, det(U V^T)) V^T of the SVD of A A_ref^T (or
    B^T B_ref) is the rotation that brings that factor closest to the reference's, and R the
    rotation nearest to (1 - strength) I + strength R*. Where a half-turn leaves no nearest one, R*
    itself is taken. A path that the reference lacks, or has as zeros, is left alone.

    Args:
        adapter: Both factors of every path; not modified.
        reference: Cut, or padded with zeros, to the adapter's ranks.
        side: The factor that is brought close.
        strength: 0 leaves everything, 1 or more applies R* in full.
        proper: Rotations only; reflections are allowed otherwise, and R* then is U V^T.
    """
    if strength <= 0:
        return adapter
    tensors: dict[str, Tensor] = {}
    for path in adapter.modules:
        name = name_a(path) if side == "a" else name_b(path)
        if name not in reference:
            continue
        a, b = adapter[name_a(path)], adapter[name_b(path)]
        target = fitted(reference[name], a.shape[0], 0 if side == "a" else 1)
        turn = _rotation(a @ target.T if side == "a" else b.T @ target, strength, proper)
        tensors[name_a(path)], tensors[name_b(path)] = turn.T @ a, b @ turn
        if name_core(path) in adapter:
            tensors[name_core(path)] = turn.T @ adapter[name_core(path)] @ turn
    return adapter.overlaid(tensors)


def _rotation(overlap: Tensor, strength: float, proper: bool) -> Tensor:
    """Return R for the overlap of a factor with its reference, (r, r)."""
    one = torch.eye(len(overlap), dtype=overlap.dtype, device=overlap.device)
    if overlap.is_meta:
        return one
    hard = _closest(overlap, proper)
    if strength >= 1:
        return hard
    left, sizes, right = torch.linalg.svd((1 - strength) * one + strength * hard)
    singular = sizes[-1] < torch.finfo(sizes.dtype).eps ** 0.5
    return torch.where(singular, hard, left @ right)


def _closest(overlap: Tensor, proper: bool) -> Tensor:
    """Return R*: as the overlap says where it says something, and the least turn elsewhere.

    In a rank beyond the matrix, or of zeros, nothing says how to turn.
    """
    u, s, vh = torch.linalg.svd(overlap)
    told = int((s > s[0] * torch.finfo(s.dtype).eps * len(s)).sum())
    rest = slice(told, None)
    turn, _, back = torch.linalg.svd(u[:, rest].T @ vh[rest].T)
    u = torch.cat([u[:, :told], u[:, rest] @ turn @ back], dim=1)
    if proper and bool(torch.linalg.det(u @ vh) < 0):
        u = torch.cat([u[:, :-1], -u[:, -1:]], dim=1)
    found: Tensor = u @ vh
    return found


def change_of_basis(b: Tensor, a_then: Tensor, a_now: Tensor) -> Tensor:
    """Return B A_v A_now^+, the B that does with A_now what `b` did with A_v (FedSVD).

    It is exact where the rows of A_now span those of A_v, and the nearest otherwise. The
    pseudo-inverse is the transpose where the rows of A_now are orthonormal.
    """
    across: Tensor = a_then @ torch.linalg.pinv(a_now)
    return b @ across


def onto_basis(adapter: Adapter, then: Adapter, now: Adapter) -> Adapter:
    """Return every B of the adapter, trained against A of `then`, for A of `now` (FedSVD).

    Where A has not changed, B stays bit for bit. A B of smaller rank goes with the leading rows.
    """
    tensors: dict[str, Tensor] = {}
    for path in adapter.modules:
        b = adapter[name_b(path)]
        old, new = (one[name_a(path)][: b.shape[1]] for one in (then, now))
        if not torch.equal(old, new):
            tensors[name_b(path)] = change_of_basis(b, old, new)
    return adapter.overlaid(tensors)


def ridge_correction(
    products: Mapping[str, Product], adapter: Adapter, strength: float
) -> dict[str, Tensor]:
    """Return B + (M - B A) A^T (A A^T + strength I)^-1 of every path, by name (LoRA-FAIR).

    It minimises ||M - B' A||^2 + strength ||B' - B||^2 over B', where s M is the wanted product;
    with strength 0, B' A is M projected on the rows of A, and for large strengths B' is B.

    Args:
        products: Path to s M.
        adapter: The averaged pair; not modified.
        strength: Weight of the distance from B, at least 0.
    """
    corrected = {}
    for path, (wanted_b, wanted_a) in products.items():
        a, b = adapter[name_a(path)], adapter[name_b(path)]
        u, s, vh = torch.linalg.svd(a, full_matrices=False)  # the inverse by it, not by A A^T
        kept = s > s[0] * torch.finfo(s.dtype).eps * max(a.shape)
        filtered = torch.where(kept, s / (s.square() + strength), 0.0)
        missing = wanted_b @ (wanted_a @ vh.T) / adapter.scaling[path] - b @ (a @ vh.T)
        corrected[name_b(path)] = b + (missing * filtered) @ u.T
    return corrected


def cosine_correction(
    products: Mapping[str, Product],
    adapter: Adapter,
    strength: float,
    steps: int,
    learning_rate: float,
) -> dict[str, Tensor]:
    """Return B + dB that makes (B + dB) A point where M does, by name (LoRA-FAIR's objective).

    Gradient steps on 1 - cos(M, (B + dB) A) + strength ||dB||, from dB = 0. The norm has a kink
    there, so each step shrinks dB by learning_rate * strength instead of following its slope:
    where nothing is to be corrected, dB stays zero.

    Args:
        products: Path to M; its size does not matter.
        adapter: The averaged pair; not modified.
        strength: Weight of ||dB||, at least 0.
        steps: How many.
        learning_rate: Size of a step.
    """
    corrected = {}
    for path, product in products.items():
        a, b = adapter[name_a(path)], adapter[name_b(path)]
        change = torch.zeros_like(b)
        gram, target = a @ a.T, _unit(product, a)
        for _ in range(steps):
            x = b + change
            size = (x * (x @ gram)).sum().clamp_min(0.0).sqrt()
            cosine = (target * x).sum() / size
            slope = torch.where(size > 0, (cosine * (x @ gram) / size - target) / size, 0.0)
            change = change - learning_rate * slope
            shrunk = 1 - learning_rate * strength / change.norm()
            change = torch.where(shrunk > 0, change * shrunk, 0.0)
        corrected[name_b(path)] = b + change
    return corrected


def _unit(product: Product, a: Tensor) -> Tensor:
    """Return M A^T / ||M||_F, whose product with B' is ||B' A|| cos(M, B' A); zero where M is."""
    b, rows = product
    size = (torch.linalg.qr(b).R @ torch.linalg.qr(rows.T).R.T).norm()
    return torch.where(size > 0, b @ (rows @ a.T) / size, 0.0)
