"""One optimiser step for the rows of many clients at once, on flat fp32 buffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedllm.config import TrainingConfig


class FlatOptimizer:
    """AdamW or SGD over a buffer with one row a client; equals torch.optim's row by row.

    Memory: AdamW keeps two buffers of the size of the parameters, SGD one with momentum, else none.

    Args:
        parameters: fp32 (K, P), changed in place.
        training: Optimiser and its constants.
    """

    def __init__(self, parameters: Tensor, training: TrainingConfig) -> None:
        self.parameters = parameters
        self.training = training
        self.steps = 0
        is_adam = training.optimizer == "adamw"
        self._first = torch.zeros_like(parameters) if is_adam or training.momentum else None
        self._second = torch.zeros_like(parameters) if is_adam else None

    def step(self, grads: Tensor, learning_rates: Tensor) -> None:
        """Do one step for the first n rows, those that still have steps to do.

        Args:
            grads: fp32 (n, P).
            learning_rates: fp32 (n, 1).
        """
        self.steps += 1
        rows = self.parameters[: len(grads)]
        decay = self.training.weight_decay
        if self._second is None:
            if decay:
                grads = grads.add(rows, alpha=decay)
            if self._first is not None:
                velocity = self._first[: len(grads)]
                velocity.mul_(self.training.momentum).add_(grads)
                grads = velocity
            rows.addcmul_(grads, learning_rates, value=-1.0)
            return
        assert self._first is not None
        first, second = self._first[: len(grads)], self._second[: len(grads)]
        beta1, beta2 = self.training.betas
        if decay:
            rows.mul_(1.0 - learning_rates * decay)
        first.lerp_(grads, 1.0 - beta1)
        second.mul_(beta2).addcmul_(grads, grads, value=1.0 - beta2)
        scale = math.sqrt(1.0 - beta2**self.steps)
        denominator = second.sqrt().div_(scale).add_(self.training.epsilon)
        update = first.div(denominator).mul_(learning_rates / (1.0 - beta1**self.steps))
        rows.sub_(update)


def clip_rows(grads: Tensor, max_norm: float) -> None:
    """Scale each row of (n, P) to at most `max_norm` (0: leave it), in place."""
    if max_norm:
        norms = grads.norm(dim=1, keepdim=True)
        grads.mul_((max_norm / (norms + 1e-6)).clamp_(max=1.0))
