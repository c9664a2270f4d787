"""Arithmetic on named tensors as on one flat vector, for server optimisers and control variates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedllm.adapters.adapter import Adapter
from fedllm.adapters.algebra import Weighted, canonical
from fedllm.adapters.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

Tensors = Mapping[str, "Tensor"]


def add(x: Tensors, y: Tensors, factor: float = 1.0) -> dict[str, Tensor]:
    """Return x + factor y for the names of x; a name that y lacks counts as zero there.

    The result lies where x does: what travelled meets what is trained on a device.

    >>> import torch
    >>> add({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(2)}, 2.0)
    {'a': tensor([3., 3.]), 'b': tensor([1.])}
    """
    return {n: t + y[n].to(t.device) * factor if n in y else t for n, t in x.items()}


def subtract(x: Tensors, y: Tensors) -> dict[str, Tensor]:
    """Return x - y for the names of x, where x lies; a name that y lacks counts as zero there."""
    return {n: t - y[n].to(t.device) if n in y else t for n, t in x.items()}


def scale(x: Tensors, factor: float) -> dict[str, Tensor]:
    """Return factor x."""
    return {name: t * factor for name, t in x.items()}


def zeros_like(x: Tensors) -> dict[str, Tensor]:
    """Return zeros of the same names and shapes."""
    return {name: torch.zeros_like(t) for name, t in x.items()}


def flat_norm(tensors: Tensors) -> float:
    """Return the Euclidean norm of all entries together; a tensor without data counts as 1."""
    return math.hypot(*(1.0 if t.is_meta else float(t.double().norm()) for t in tensors.values()))


def mean_padded(parts: Weighted, onto: Adapter) -> dict[str, Tensor]:
    """Return the weighted mean of zero-padded tensors (HetLoRA).

    Unlike in `algebra.mean`, a rank component that a participant lacks counts as zero. Weights are
    normalised for each tensor over those that sent it. What lies beyond the rank of them all stays
    as it is in `onto`: zeros in both factors would never learn again.

    Scalings that differ from `onto`'s are first brought to it.

    Args:
        parts: Weights and adapters, of ranks up to `onto`'s.
        onto: Has the shapes and scalings of the result; not modified.
    """
    mean: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for _, adapter in parts for name in adapter):
        owners = [(weight, adapter) for weight, adapter in parts if name in adapter]
        total = sum(weight for weight, _ in owners)
        tensors = [(weight / total, canonical(name, one, onto)) for weight, one in owners]
        mean[name] = onto[name].clone()
        for _, tensor in tensors:
            mean[name][_leading(tensor)] = 0.0
        for share, tensor in tensors:
            mean[name][_leading(tensor)].add_(tensor, alpha=share)
    return mean


def _leading(tensor: Tensor) -> tuple[slice, ...]:
    """Return the part of a larger tensor that one of this shape fills."""
    return tuple(slice(length) for length in tensor.shape)


def truncated_to(tensors: Tensors, like: Tensors) -> dict[str, Tensor]:
    """Return the leading part of each tensor that has the shape of its namesake in `like`.

    Names that `like` lacks are left out: a smaller participant has no use for them.
    """
    return {
        name: tensor[_leading(like[name])].clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if name in like
    }
