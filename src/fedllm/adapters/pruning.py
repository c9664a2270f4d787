"""The tail of an adapter's rank: how large it is, and cutting it off (HetLoRA).

The tail of a path of rank r are the rows of A and columns of B from floor(share * r) on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedllm.adapters.adapter import Adapter
from fedllm.adapters.algebra import truncate
from fedllm.adapters.lazy import LazyModule
from fedllm.adapters.names import is_a, module_of, name_b

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


def kept_rank(rank: int, share: float, smallest: int) -> int:
    """Return how much of a rank comes before its tail: floor(share * rank), `smallest` at least.

    >>> kept_rank(8, 0.99, 1), kept_rank(8, 1.0, 1), kept_rank(4, 0.5, 3), kept_rank(2, 0.5, 3)
    (7, 8, 3, 2)
    """
    # 0.29 * 100 is a little below 29
    return min(rank, max(smallest, math.floor(share * rank + 1e-9)))


def tail_size(tensors: Mapping[str, Tensor], share: float, smallest: int = 1) -> Tensor:
    """Return the sum over paths of ||tail of A||_F ||tail of B||_F, differentiable.

    Args:
        tensors: Both factors of every path, by name.
        share: Where the tail begins; at 1 it is empty.
        smallest: Rank that is never part of a tail.
    """
    sizes = []
    for name, a in tensors.items():
        if is_a(name):
            keep = kept_rank(a.shape[0], share, smallest)
            b = tensors[name_b(module_of(name))]
            sizes.append(a[keep:].norm() * b[:, keep:].norm())
    return torch.stack(sizes).sum()


def pruned(trained: Adapter, start: Adapter, share: float, smallest: int) -> Adapter:
    """Return the trained adapter without its tail if that has become smaller than at the start."""
    if any(tensor.is_meta for tensor in trained.tensors.values()):
        return trained  # shapes alone tell the most that can be sent
    after, before = (tail_size(one.tensors, share, smallest) for one in (trained, start))
    if not bool(after < before):
        return trained
    return truncate(trained, kept_rank(trained.rank, share, smallest))
