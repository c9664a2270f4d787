"""The product of a frozen layer with every client's low-rank path, as one autograd node.

The forward pass saves the input and the rank-r activation; the backward pass writes the factors'
gradients straight into the cohort's flat buffers, so no parameter of a client is a graph leaf.

The paths are computed a segment at a time on a CPU. On a GPU, where many small products are bound
by their launches, all clients' factors form one wide product whose columns are masked by the owner
of each row: K times the arithmetic of a path that is thin beside the base, in two launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedllm.engine.packing import Segment
from fedllm.engine.routing import ColumnWeights, Router

Delta = tuple[Tensor, Tensor] | Tensor
"""What was merged into a base weight: factors (b, a), or a dense (out, in) matrix."""


@dataclass
class LowRank:
    """The factors of one module for all clients of a cohort, and where their gradients go."""

    a: Tensor
    """(K, R, in), in the compute dtype."""
    b: Tensor
    """(K, out, R)."""
    scaling: Sequence[float]
    """alpha / r of each client."""
    grad_a: Tensor | None = None
    """(K, R, in) fp32; None if A is frozen or nothing is trained."""
    grad_b: Tensor | None = None
    router: Router | None = None
    """What weighs the paths token by token, if the layer has a router."""
    paths: tuple[str, ...] = ("",)
    """Slots of the paths that are stacked in A and B."""
    columns: Tensor | None = None
    """int (R,): the path of each column; None where there is only one."""

    @property
    def wide_a(self) -> Tensor:
        """All clients' A, (K R, in)."""
        return self.a.reshape(-1, self.a.shape[2])

    @property
    def wide_b(self) -> Tensor:
        """All clients' B, (out, K R)."""
        return self.b.permute(1, 0, 2).reshape(self.b.shape[1], -1)

    def owners(self, segments: Sequence[Segment], x: Tensor) -> Tensor:
        """Return (rows, K R): a client's scaling on its own rows and columns, else zero."""
        clients, rank = self.a.shape[:2]
        mask = x.new_zeros(x.shape[0], clients, rank)
        for row, start, end in segments:
            mask[start:end, row] = self.scaling[row]
        return mask.flatten(1)


class LowRankPath(torch.autograd.Function):
    """y = x W^T + bias + x delta^T + scaling (x * keep) A^T B^T, a segment a client.

    Args of `forward`: x (rows, in); an anchor that makes a pass over frozen inputs differentiable;
    weight (out, in) and bias, or None to leave the base product out; factors; delta; segments; the
    scaled dropout mask; whether all clients form one wide product; weights of the columns (rows, R)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        low_rank: LowRank | None,
        delta: Delta | None,
        segments: Sequence[Segment],
        keep: Tensor | None,
        is_wide: bool,
        given: Tensor | None = None,
    ) -> Tensor:
        """Compute in place on the base layer's output."""
        if weight is not None:
            y = F.linear(x, weight, bias)
        else:
            y = x.new_zeros(x.shape[0], _rows(low_rank, delta))
        if delta is not None:
            _add_delta(y, x, delta)
        hidden: list[Tensor] = []
        weights = ColumnWeights(None if low_rank is None else low_rank.router, given)
        is_wide = is_wide and weights.is_one
        if low_rank is not None:
            dropped = x if keep is None else x * keep
            if is_wide:
                mask = low_rank.owners(segments, x)
                hidden = [(dropped @ low_rank.wide_a.T).mul_(mask), mask]
                y.addmm_(hidden[0], low_rank.wide_b.T)
            else:
                hidden = _add_paths(y, x, dropped, low_rank, segments, weights)
        needs_x = low_rank is not None and (low_rank.grad_a is not None or bool(low_rank.router))
        ctx.save_for_backward(x if needs_x else None, keep, weight, *hidden)
        ctx.parts = low_rank, delta, segments, is_wide, weights
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the input's gradient; add the factors' to their buffers."""
        low_rank, delta, segments, is_wide, weights = ctx.parts
        x, keep, weight, *hidden = ctx.saved_tensors
        dy = grads[0]
        dx = None
        if ctx.needs_input_grad[0]:
            inner = weight.shape[1] if weight is not None else _columns(low_rank, delta)
            dx = dy @ weight if weight is not None else dy.new_zeros(len(dy), inner)
            if delta is not None:
                _add_delta_grad(dx, dy, delta)
        if low_rank is not None:
            seen = x if x is None or keep is None else x * keep
            if is_wide:
                _wide_backward(dx, dy, seen, keep, low_rank, hidden)
            else:
                moved = x, seen, keep
                _segment_backward(dx, dy, moved, low_rank, hidden, segments, weights)
        return dx, *(None,) * 9


def _add_paths(
    y: Tensor,
    x: Tensor,
    dropped: Tensor,
    low_rank: LowRank,
    segments: Sequence[Segment],
    weights: ColumnWeights,
) -> list[Tensor]:
    """Add each segment's path to y; return the rank-R activations."""
    hidden = []
    for row, start, end in segments:
        h = dropped[start:end] @ low_rank.a[row].T
        share = weights.of(row, x[start:end], start, end)
        inner = h if share is None else h * share
        y[start:end].addmm_(inner, low_rank.b[row].T, alpha=low_rank.scaling[row])
        hidden.append(h)
    return hidden


def _segment_backward(
    dx: Tensor | None,
    dy: Tensor,
    moved: tuple[Tensor | None, Tensor | None, Tensor | None],
    low_rank: LowRank,
    hidden: Sequence[Tensor],
    segments: Sequence[Segment],
    weights: ColumnWeights,
) -> None:
    x, seen, keep = moved
    for h, (row, start, end) in zip(hidden, segments, strict=True):
        d, s = dy[start:end], low_rank.scaling[row]
        own = d if x is None else x[start:end]
        share = None if weights.is_one else weights.of(row, own, start, end)
        if low_rank.grad_b is not None:
            low_rank.grad_b[row].add_(d.T @ (h if share is None else h * share), alpha=s)
        if seen is None and dx is None:
            continue
        g = d @ low_rank.b[row]
        if low_rank.router is not None and x is not None:
            back = None if dx is None else dx[start:end]
            low_rank.router.backward(row, x[start:end], g * h * s, back)
        g = g if share is None else g * share
        if low_rank.grad_a is not None and seen is not None:
            low_rank.grad_a[row].add_(g.T @ seen[start:end], alpha=s)
        if dx is None:
            continue
        if keep is None:
            dx[start:end].addmm_(g, low_rank.a[row], alpha=s)
        else:
            dx[start:end].addcmul_(g @ low_rank.a[row], keep[start:end], value=s)


def _wide_backward(
    dx: Tensor | None,
    dy: Tensor,
    seen: Tensor | None,
    keep: Tensor | None,
    low_rank: LowRank,
    hidden: Sequence[Tensor],
) -> None:
    h, mask = hidden
    clients, rank = low_rank.a.shape[:2]
    if low_rank.grad_b is not None:
        low_rank.grad_b.add_((dy.T @ h).reshape(-1, clients, rank).permute(1, 0, 2))
    if seen is None and dx is None:
        return
    g = (dy @ low_rank.wide_b).mul_(mask)
    if low_rank.grad_a is not None and seen is not None:
        low_rank.grad_a.add_((g.T @ seen).view(clients, rank, -1))
    if dx is not None:
        back = g @ low_rank.wide_a
        dx.add_(back if keep is None else back.mul_(keep))


def _rows(low_rank: LowRank | None, delta: Delta | None) -> int:
    if low_rank is not None:
        return low_rank.b.shape[1]
    assert delta is not None
    return delta.shape[0] if isinstance(delta, Tensor) else delta[0].shape[0]


def _columns(low_rank: LowRank | None, delta: Delta | None) -> int:
    if low_rank is not None:
        return low_rank.a.shape[2]
    assert delta is not None
    return delta.shape[1] if isinstance(delta, Tensor) else delta[1].shape[1]


def _add_delta(y: Tensor, x: Tensor, delta: Delta) -> None:
    if isinstance(delta, Tensor):
        y.addmm_(x, delta.T)
    else:
        y.addmm_(x @ delta[1].T, delta[0].T)


def _add_delta_grad(dx: Tensor, dy: Tensor, delta: Delta) -> None:
    if isinstance(delta, Tensor):
        dx.addmm_(dy, delta)
    else:
        dx.addmm_(dy @ delta[0], delta[1])
