"""Adapters of many clients in flat buffers, one row a client, and the views layers work on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.adapters import Adapter, BaseDelta, is_head, is_index
from fedllm.engine.low_rank import Delta


@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in a row."""

    offsets: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    size: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """Lay tensors of these shapes end to end."""
        offsets, size = {}, 0
        for name, shape in shapes.items():
            offsets[name] = size
            size += math.prod(shape)
        return cls(offsets, dict(shapes), size)

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """View one tensor of every row, (K, *shape)."""
        start = self.offsets[name]
        flat = buffer[:, start : start + math.prod(self.shapes[name])]
        return flat.view(buffer.shape[0], *self.shapes[name])


def common_shapes(adapters: Sequence[Adapter]) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape at the largest rank of any adapter."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in adapters[0]:
        sizes = [tuple(adapter[name].shape) for adapter in adapters]
        shapes[name] = tuple(max(axis) for axis in zip(*sizes, strict=True))
    return shapes


class Buffer:
    """Some of the tensors of K adapters, zero-padded to common shapes, in fp32.

    A smaller rank's padding stays zero by itself: the gradient of a zero row of A goes through the
    zero column of B, and the other way round.

    Args:
        adapters: One a row.
        keep: Which tensors.
        device: Where the buffer lies.
    """

    def __init__(
        self, adapters: Sequence[Adapter], keep: Callable[[str], bool], device: torch.device
    ) -> None:
        wanted = [adapter.select(lambda n: keep(n) and not is_index(n)) for adapter in adapters]
        shapes = common_shapes(wanted)
        self.layout = Layout.of(shapes)
        self.data = torch.zeros(len(adapters), self.layout.size, device=device)
        for row, adapter in enumerate(adapters):
            for name in shapes:
                tensor = adapter[name]
                self.place(self.data, name, row, tensor.shape).copy_(tensor)

    def place(self, buffer: Tensor, name: str, row: int, shape: Iterable[int]) -> Tensor:
        """View the part of a row's tensor that is not padding."""
        view = self.layout.view(buffer, name)[row]
        return view[tuple(slice(size) for size in shape)]

    def __contains__(self, name: str) -> bool:
        return name in self.layout.offsets


def head_tensors(
    heads: Sequence[str], buffers: Sequence[tuple[Buffer, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Return the parameters (K, ...) of each head module, by their names inside it."""
    found: dict[str, dict[str, Tensor]] = {}
    for buffer, data in buffers:
        for name in buffer.layout.offsets:
            if is_head(name):
                head = next(h for h in heads if name.startswith(h + "."))
                own = name.removeprefix(head + ".")
                found.setdefault(head, {})[own] = buffer.layout.view(data, name)
    return found


def base_delta(base: BaseDelta, dtype: torch.dtype, device: torch.device) -> dict[str, Delta]:
    """Return what was merged into the base, in the compute dtype on the device."""
    ready: dict[str, Delta] = {
        module: matrix.to(device, dtype) for module, matrix in base.dense.items()
    }
    for module, (b, a) in base.products.items():
        ready[module] = (b.to(device, dtype), a.to(device, dtype))
    return ready
