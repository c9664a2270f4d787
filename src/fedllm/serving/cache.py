"""Keys and values of the sequences of a batch, which sequences join and leave between steps.

Rows end together: a shorter sequence has unused columns on its left. Distances between tokens are
then distances between columns, so every attention rule of transformers (windows, say) holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

_SPARE = 64
"""Columns kept free for tokens to come."""


class RowLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers'
    """Keys and values of one layer, each (rows, heads, capacity, head_dim)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers'
        self.used = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (rows, heads, new, head_dim) and return all that is there."""
        end = self.used + key_states.shape[2]
        self.keys = _appended(self.keys, key_states, self.used, end)
        self.values = _appended(self.values, value_states, self.used, end)
        self.used, self.is_initialized = end, True
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Return the columns in use."""
        return self.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns there will be, and the first one."""
        return self.used + query_length, 0


class RowCache(Cache):
    """The cache of a batch.

    Args:
        num_layers: Attention layers of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self.rows = [RowLayer() for _ in range(num_layers)]
        super().__init__(layers=[*self.rows])

    @property
    def used(self) -> int:
        """Columns in use."""
        return max(layer.used for layer in self.rows)

    @property
    def nbytes(self) -> int:
        """What is allocated."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.rows
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        )

    def rewind(self, used: int) -> None:
        """Forget what a pass that failed has appended."""
        for layer in self.rows:
            layer.used = min(layer.used, used)

    def take(
        self, kept: Sequence[int], places: Sequence[int], other: RowCache, length: int
    ) -> RowCache:
        """Return a cache of `length` columns with some rows of this one and all of another.

        Args:
            kept: Rows of this cache.
            places: Row in the new cache of each kept row, then of each row of `other`.
            other: A cache whose rows join; empty if none do.
            length: Tokens of the longest row that stays.
        """
        result = RowCache(len(self.rows))
        sources = [(self, list(kept)), (other, list(range(len(places) - len(kept))))]
        split = len(kept)
        targets = [list(places[:split]), list(places[split:])]
        for i, layer in enumerate(result.rows):
            for (cache, rows), target in zip(sources, targets, strict=True):
                if rows:
                    _place(layer, cache.rows[i], rows, target, len(places), length)
            layer.used, layer.is_initialized = length, True
        return result


def _place(
    layer: RowLayer,
    source: RowLayer,
    rows: Sequence[int],
    target: Sequence[int],
    size: int,
    length: int,
) -> None:
    """Copy the last columns of some rows of a layer into rows of another."""
    assert source.keys is not None
    assert source.values is not None
    width = min(length, source.used)
    pick = torch.tensor(rows, device=source.keys.device)
    put = torch.tensor(target, device=source.keys.device)
    if layer.keys is None or layer.values is None:
        layer.keys = _room(source.keys, size, length + _SPARE)
        layer.values = _room(source.values, size, length + _SPARE)
    for old, new in ((source.keys, layer.keys), (source.values, layer.values)):
        part = old[:, :, source.used - width : source.used].index_select(0, pick)
        new[:, :, length - width : length].index_copy_(0, put, part)


def _appended(store: Tensor | None, states: Tensor, used: int, end: int) -> Tensor:
    """Write states into columns `used` to `end`, in more room if there is too little."""
    if store is None:
        store = _room(states, len(states), end)
    elif end > store.shape[2]:
        grown = _room(store, len(store), end + max(_SPARE, end // 4))
        grown[:, :, :used] = store[:, :, :used]
        store = grown
    store[:, :, used:end] = states
    return store


def _room(like: Tensor, rows: int, columns: int) -> Tensor:
    # zeros: what is masked must be finite all the same
    return like.new_zeros(rows, like.shape[1], columns, like.shape[3])
