"""Weights of a layer's paths, token by token: a router's largest outputs, or given ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class Router:
    """The routers of one layer, of all clients of a cohort."""

    weight: Tensor
    """(K, S, in): S outputs, in the compute dtype."""
    slots: Tensor
    """(K, S, P): which of the P paths each output stands for, one-hot."""
    top: int
    """How many outputs are kept."""
    columns: Tensor
    """int (R,): the path that each column of the stacked factors belongs to."""
    grad: Tensor | None = None
    """(K, S, in) fp32; None if routers are frozen."""

    def columns_of(self, row: int, logits: Tensor) -> Tensor:
        """Return the weight of every column for every token, fp32 (T, R), from logits (T, S)."""
        share = torch.softmax(logits, dim=-1)
        if self.top < share.shape[1]:
            kept = torch.zeros_like(share)
            kept.scatter_(1, share.topk(self.top, dim=1).indices, 1.0)
            share = share * kept
            share = share / share.sum(dim=1, keepdim=True)
        own = self.slots[row]
        # a path that no output stands for is not routed
        return (share @ own + (own.sum(dim=0) == 0))[:, self.columns]

    def logits(self, row: int, x: Tensor) -> Tensor:
        """Return a client's logits, fp32 (T, S), from inputs (T, in)."""
        return (x @ self.weight[row].T).float()

    def backward(self, row: int, x: Tensor, slope: Tensor, dx: Tensor | None) -> None:
        """Pass the gradient of the column weights, (T, R), on to the router and the input."""
        logits = self.logits(row, x).requires_grad_()
        with torch.enable_grad():
            weights = self.columns_of(row, logits)
        (d_logits,) = torch.autograd.grad(weights, logits, slope.float())
        if self.grad is not None:
            self.grad[row].addmm_(d_logits.T, x.float())
        if dx is not None:
            dx.addmm_(d_logits.to(dx.dtype), self.weight[row])


class ColumnWeights(NamedTuple):
    """What weighs the columns of the stacked factors besides the scaling."""

    router: Router | None
    given: Tensor | None
    """(rows, R): weights from outside, for each row of the activation."""

    @property
    def is_one(self) -> bool:
        """Whether nothing is weighed."""
        return self.router is None and self.given is None

    def of(self, row: int, x: Tensor, start: int, end: int) -> Tensor | None:
        """Return the weights (T, R) of a client's stretch of the activation; None is all ones."""
        weights = None if self.given is None else self.given[start:end]
        if self.router is None:
            return weights
        routed = self.router.columns_of(row, self.router.logits(row, x)).to(x.dtype)
        return routed if weights is None else routed * weights


def one_hot(slots: Sequence[Sequence[str]], paths: Sequence[str]) -> Tensor:
    """Return (K, S, P) with a 1 where output S of client K stands for path P."""
    table = torch.zeros(len(slots), len(slots[0]), len(paths))
    for k, own in enumerate(slots):
        for s, slot in enumerate(own):
            table[k, s, list(paths).index(slot)] = 1.0
    return table
