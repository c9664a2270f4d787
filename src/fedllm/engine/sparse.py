"""A sparse change of a layer's weight for each client: the same places, other values (SLoRA).

The (out, in) matrix of one client exists only while its stretch of the activation is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.engine.packing import Segment


@dataclass
class Sparse:
    """The changes of one layer, of all clients of a cohort."""

    index: Tensor
    """int64 (n,): places in the flattened (out, in) matrix."""
    values: Tensor
    """(K, n), in the compute dtype."""
    shape: tuple[int, int]
    """(out, in)."""
    grad: Tensor | None = None
    """(K, n) fp32; None if nothing is trained."""

    def dense(self, row: int) -> Tensor:
        """Return a client's change as a matrix (out, in)."""
        flat = self.values.new_zeros(self.shape[0] * self.shape[1])
        flat[self.index] = self.values[row]
        return flat.view(self.shape)


class SparsePath(torch.autograd.Function):
    """y = x D^T, with D the sparse change of the client that each segment is of."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor | None, sparse: Sparse, segments: Sequence[Segment]
    ) -> Tensor:
        """Return (rows, out) from x (rows, in)."""
        y = x.new_zeros(x.shape[0], sparse.shape[0])
        for row, start, end in segments:
            torch.mm(x[start:end], sparse.dense(row).T, out=y[start:end])
        ctx.save_for_backward(x)
        ctx.parts = sparse, segments
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the input's gradient; add the values' to their buffer."""
        sparse, segments = ctx.parts
        (x,) = ctx.saved_tensors
        dy = grads[0]
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        for row, start, end in segments:
            if dx is not None:
                torch.mm(dy[start:end], sparse.dense(row), out=dx[start:end])
            if sparse.grad is not None:
                whole = (dy[start:end].T @ x[start:end]).reshape(-1)
                sparse.grad[row].add_(whole[sparse.index])
        return dx, None, None, None
