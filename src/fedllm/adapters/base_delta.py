"""What has been merged into the base weights so far, kept apart from them in fp32.

W itself is never written to: a 0.1 % increment vanishes in a bf16 weight, and a 4-bit weight cannot
be added to at all. Clients apply the delta as an extra frozen adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedllm.adapters.adapter import Product
from fedllm.adapters.lazy import LazyModule
from fedllm.adapters.wire_formats import AS_IS, WireCodec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


@dataclass(frozen=True)
class BaseDelta:
    """The sum of all merged increments, each module low-rank or dense, whichever is smaller."""

    products: Mapping[str, Product] = field(default_factory=dict)
    """Module to stacked factors."""
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    """Module to an (out, in) matrix, once its factors would be larger."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(version, bytes) of each increment, for the ledger."""

    @property
    def version(self) -> int:
        """The version of the last increment; -1 if there is none."""
        return self.sizes[-1][0] if self.sizes else -1

    def merged(
        self, version: int, increment: Mapping[str, Product], codec: WireCodec = AS_IS
    ) -> BaseDelta:
        """Return the delta with one more increment, which makes the base of `version`.

        All hold the increment as the codec brings it to the clients, so that all have one base.
        """
        products, dense = dict(self.products), dict(self.dense)
        size = 0
        for module, sent in increment.items():
            size += sum(_nbytes(tensor, codec) for tensor in sent)
            b, a = sent if codec.is_lossless else Product(*map(codec.round_trip, sent))
            if module in dense:
                dense[module] = dense[module] + b @ a
                continue
            if module in products:
                old = products[module]
                b, a = torch.cat([old.b, b], dim=1), torch.cat([old.a, a])
            products[module] = Product(b, a)
            if b.shape[1] * (b.shape[0] + a.shape[1]) > b.shape[0] * a.shape[1]:
                dense[module] = products.pop(module).dense()
        return BaseDelta(products, dense, (*self.sizes, (version, size)))

    def nbytes_since(self, version: int, codec: WireCodec = AS_IS) -> int:
        """Return what a client whose base is of `version` must download to be up to date.

        It is sent the increments it lacks, or the whole sum where that is smaller.
        """
        missing = sum(size for made, size in self.sizes if made > version)
        tensors = [t for product in self.products.values() for t in product]
        tensors += self.dense.values()
        return min(missing, sum(_nbytes(tensor, codec) for tensor in tensors))

    def since(self, earlier: BaseDelta) -> dict[str, Product | Tensor]:
        """Return what has been added to each module since an earlier state of this delta."""
        added: dict[str, Product | Tensor] = {}
        for module, (b, a) in self.products.items():
            old = earlier.products[module].b.shape[1] if module in earlier.products else 0
            if old < b.shape[1]:
                added[module] = Product(b[:, old:], a[old:])
        for module, matrix in self.dense.items():
            if module in earlier.dense:
                added[module] = matrix - earlier.dense[module]
            elif module in earlier.products:
                added[module] = matrix - earlier.products[module].dense()
            else:
                added[module] = matrix
        return added

    def as_products(self) -> dict[str, Product]:
        """Return every module's delta as exact factors of the smallest rank at hand."""
        factored = {}
        for module, matrix in self.dense.items():
            identity = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
            wide = matrix.shape[0] <= matrix.shape[1]
            factored[module] = Product(identity, matrix) if wide else Product(matrix, identity)
        return {**self.products, **factored}


def _nbytes(tensor: Tensor, codec: WireCodec) -> int:
    return codec.nbytes(tuple(tensor.shape), tensor.element_size())
