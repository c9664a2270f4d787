"""Terms that clients add to their task loss, differentiable in the live tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedllm.adapters.lazy import LazyModule
from fedllm.adapters.names import in_slot, is_b, slot_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


def square_distance(live: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Tensor:
    """Return || live - anchor ||^2 over all names of `live` (FedProx, Ditto).

    Args:
        live: The trained tensors, by name.
        anchor: Has all of these names; not differentiated, wherever it lies.
    """
    gaps = [tensor - anchor[name].to(tensor) for name, tensor in live.items()]
    return torch.stack([gap.square().sum() for gap in gaps]).sum()


def overlap(
    live: Mapping[str, Tensor], frozen: Mapping[str, Tensor], weights: Mapping[str, float]
) -> Tensor | None:
    """Return the weighted sum of || B_slot^T B ||_F^2 over frozen slots and live paths (HiLoRA).

    It is zero where the columns of each live B are orthogonal to those of the frozen ones, and
    None where nothing is frozen beside a live path.

    Args:
        live: The trained tensors, by name; only B counts.
        frozen: B of the same layers in other slots; not differentiated, wherever it lies.
        weights: Slot to the weight of its term.
    """
    terms = [
        weight * (frozen[other].to(tensor).T @ tensor).square().sum()
        for name, tensor in live.items()
        if is_b(name)
        for slot, weight in weights.items()
        if slot != slot_of(name) and (other := in_slot(name, slot)) in frozen
    ]
    return torch.stack(terms).sum() if terms else None
