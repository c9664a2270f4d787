"""Adapters with random factors and their dense products: what the algebra is held against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.adapters import Adapter, algebra, name_a, name_b

SHAPES = {"q": (20, 14), "v": (14, 20)}
HEAD = "score.weight"
Parts = list[tuple[float, Adapter]]

quick = settings(deadline=None, max_examples=30)


def adapter(
    seed: int, rank: int, scaling: float = 2.0, dtype: torch.dtype = torch.float64
) -> Adapter:
    """Return an adapter with random factors, neither of them zero."""
    draw = np.random.default_rng(seed)
    tensors = {HEAD: torch.from_numpy(draw.normal(size=(3, 14))).to(dtype)}
    for module, (rows, columns) in SHAPES.items():
        tensors[name_a(module)] = torch.from_numpy(draw.normal(size=(rank, columns))).to(dtype)
        tensors[name_b(module)] = torch.from_numpy(draw.normal(size=(rows, rank))).to(dtype)
    return Adapter(tensors, dict.fromkeys(SHAPES, scaling))


def dense(of: Adapter, module: str) -> Tensor:
    """Return s B A, written out."""
    return of.scaling[module] * (of[name_b(module)] @ of[name_a(module)])


def dense_sum(parts: Parts, module: str) -> Tensor:
    """Return sum_k w_k s_k B_k A_k, written out."""
    return torch.stack([w * dense(a, module) for w, a in parts]).sum(dim=0)


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> bool:
    """Compare in the Frobenius norm, relative where the norm exceeds 1."""
    return float((got - wanted).norm()) <= tolerance * max(1.0, float(wanted.norm()))


def same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Compare tensors by name."""
    return set(got) == set(wanted) and all(close(got[n], wanted[n]) for n in wanted)


def truncated_svd(matrix: Tensor, rank: int) -> Tensor:
    """Return the best rank-`rank` approximation, by numpy."""
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])


seeds = st.integers(0, 2**20)
scalings = st.floats(0.25, 8.0)
weights = st.floats(0.01, 10.0)


@st.composite
def cohorts(
    draw: st.DrawFn,
    ranks: st.SearchStrategy[int] | None = None,
    weight: st.SearchStrategy[float] = weights,
    scaling: st.SearchStrategy[float] = scalings,
) -> Parts:
    """Draw one to five participants, of any ranks unless told otherwise."""
    ranks = st.integers(1, 6) if ranks is None else ranks
    members = draw(st.lists(st.tuples(weight, ranks, scaling, seeds), min_size=1, max_size=5))
    return [(w, adapter(seed + 31 * i, r, s)) for i, (w, r, s, seed) in enumerate(members)]


def mean_of(parts: Parts) -> dict[str, Tensor]:
    """The mean onto zeros of the largest shapes, in the first participant's scaling."""
    largest = max(own.rank for _, own in parts)
    zeros = {
        name: torch.zeros_like(tensor)
        for _, own in parts
        for name, tensor in algebra.pad(own, largest).tensors.items()
    }
    return algebra.mean(parts, Adapter(zeros, parts[0][1].scaling))
