"""What the server optimisers share: the mean change of a round as a gradient, tensor by tensor.

Only tensors that updates carried are moved, so a method that sends its halves in turn has a set of
moments for each half, which rests while the other is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedllm.adapters import linear
from fedllm.federation.base import BaseServer
from fedllm.federation.messages import Part

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class StepServer(BaseServer):
    """Takes the method's aggregate as a direction, and steps along it."""

    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    """eta: how far the server goes."""

    def step(self, name: str, change: Tensor) -> Tensor:
        """Return how far a tensor moves, from the mean change of its clients: by default eta D."""
        return change * self.server_learning_rate

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Move each tensor that was sent by a step instead of by the mean change."""
        before = self.adapter
        super().aggregate(parts)
        sent = {name for part in parts for name in part.update.adapter if name in before}
        after = {name: self.adapter[name] for name in self.adapter if name in sent}
        changes = linear.subtract(after, before.tensors)
        moved = {n: before[n] + self.step(n, change) for n, change in changes.items()}
        self.adapter = self.adapter.overlaid(moved)


@dataclass(kw_only=True)
class MomentServer(StepServer):
    """A server optimiser with two moments: x <- x + eta m / (sqrt(v) + tau)."""

    server_learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """eta: how far the server goes."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """b1: how much of the first moment stays."""
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """Keeps steps small where changes are; the second moment starts at tau^2."""
    first_moment: dict[str, Tensor] = field(default_factory=dict, init=False)
    second_moment: dict[str, Tensor] = field(default_factory=dict, init=False)

    def second(self, before: Tensor, square: Tensor) -> Tensor:
        """Return the next v from the last one and D^2."""
        raise NotImplementedError

    def step(self, name: str, change: Tensor) -> Tensor:
        """Return eta m / (sqrt(v) + tau), and keep both moments."""
        first = self.first_moment.get(name, change * 0.0)
        second = self.second_moment.get(name, change * 0.0 + self.tau**2)
        m = first * self.beta1 + change * (1 - self.beta1)
        v = self.second(second, change * change)
        self.first_moment = {**self.first_moment, name: m}
        self.second_moment = {**self.second_moment, name: v}
        return m / (v.sqrt() + self.tau) * self.server_learning_rate
