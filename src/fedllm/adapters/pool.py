"""What each member sent last, and the mean of all but one of them at the cost of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedllm.adapters.adapter import Adapter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pool:
    """Weighted adapters of the same names, by member, with their sum.

    The sum is held in float64, so that taking a member out of it leaves the rounding of the
    adapters' own precision at most.
    """

    members: Mapping[int, tuple[float, Adapter]] = field(default_factory=dict)
    """Member to weight and adapter."""
    total: Mapping[str, Tensor] = field(default_factory=dict)
    """Sum of weight times tensor, in float64."""

    def with_member(self, member: int, weight: float, adapter: Adapter) -> Pool:
        """Return the pool with a member's adapter added or replaced; all have the same names."""
        total = {name: tensor.double() * weight for name, tensor in adapter.tensors.items()}
        if self.total:
            total = {name: self.total[name] + tensor for name, tensor in total.items()}
        if member in self.members:
            old_weight, old = self.members[member]
            total = {name: t - old[name].double() * old_weight for name, t in total.items()}
        return Pool({**self.members, member: (weight, adapter)}, total)

    def mean_without(self, member: int | None) -> dict[str, Tensor]:
        """Return the weighted mean of all other members' tensors; nothing if there are none.

        Args:
            member: Who is left out; None, or one who is not in the pool, leaves out nobody.
        """
        others = [weight for other, (weight, _) in self.members.items() if other != member]
        if not others:
            return {}
        total = self.total
        if member is not None and member in self.members:
            own_weight, own = self.members[member]
            total = {name: t - own[name].double() * own_weight for name, t in total.items()}
        _, like = next(iter(self.members.values()))
        return {name: (t / sum(others)).to(like[name].dtype) for name, t in total.items()}
