"""Losses over the outputs of one pass: next-token prediction, and classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 4096


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy of each row, with one saved tensor and no fp32 copy of the logits kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Return -log softmax(logits)[target] in fp32, in chunks of rows."""
        losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        normaliser = torch.empty_like(losses)
        for start in range(0, len(targets), _CHUNK):
            part = slice(start, start + _CHUNK)
            wide = logits[part].float()
            losses[part] = F.cross_entropy(wide, targets[part], reduction="none")
            normaliser[part] = losses[part] + wide.gather(1, targets[part, None]).squeeze(1)
        ctx.save_for_backward(logits, targets, normaliser)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return (softmax - one-hot) times the gradient of each row."""
        logits, targets, normaliser = ctx.saved_tensors
        d = torch.empty_like(logits)
        for start in range(0, len(targets), _CHUNK):
            part = slice(start, start + _CHUNK)
            p = (logits[part].float() - normaliser[part, None]).exp_()
            p.scatter_add_(1, targets[part, None], -torch.ones_like(p[:, :1]))
            d[part] = p.mul_(grads[0][part, None])
        return d, None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each row, fp32 (n,), from logits (n, classes) and targets (n,)."""
    losses: Tensor = _TokenLoss.apply(logits, targets)  # type: ignore[no-untyped-call]  # untyped in torch
    return losses


def is_likeliest(logits: Tensor, targets: Tensor) -> Tensor:
    """Return whether greedy choice takes each row's target, bool (n,).

    Of equal logits it takes the first: a model that prefers nothing is not always right.
    """
    return logits.argmax(dim=-1) == targets


@dataclass(frozen=True)
class PassOutput:
    """What a pass produces: one entry for each predicted token or each sequence."""

    losses: Tensor
    """fp32 (n,)."""
    owners: Tensor
    """int (n,): the sequence of the pass that an entry belongs to."""
    correct: Tensor | None
    """bool (n,): whether greedy choice takes the right token or class; None in training."""
    choices: Tensor | None
    """int (n,): the likeliest class; None in training and for tokens."""
