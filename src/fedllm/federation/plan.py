"""How much a client trains in a round, and at which learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from fedllm.config import TrainingConfig


@dataclass(frozen=True)
class Plan:
    """Steps and learning rates, from the configuration."""

    training: TrainingConfig
    rounds: int

    @cached_property
    def rows_per_step(self) -> int:
        """Examples in one optimiser step."""
        return self.training.batch_size * self.training.gradient_accumulation

    def steps(self, num_rows: int) -> int:
        """Return the optimiser steps a client with this many rows does in a round.

        The last batch of an epoch may be smaller, so a client with fewer rows than a batch works.
        """
        if self.training.local_steps is not None:
            return self.training.local_steps
        return (self.training.local_epochs or 1) * math.ceil(num_rows / self.rows_per_step)

    def learning_rate(self, version: int) -> float:
        """Return the peak learning rate of the round that starts from this version."""
        done = min(version / max(self.rounds, 1), 1.0)
        match self.training.round_schedule:
            case "constant":
                factor = 1.0
            case "linear":
                factor = 1.0 - done
            case "cosine":
                factor = 0.5 * (1.0 + math.cos(math.pi * done))
            case "exponential":
                factor = self.training.round_decay**version
        return self.training.learning_rate * factor

    def step_factor(self, step: int, steps: int) -> float:
        """Return the factor on the round's learning rate at local step `step` of `steps`."""
        warmup = self.training.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(steps - warmup, 1)
        match self.training.step_schedule:
            case "constant":
                return 1.0
            case "linear":
                return 1.0 - done
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * done))
