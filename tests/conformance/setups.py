"""Every row of the table, with equal ranks and, where that is defined, with mixed ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from conformance.cases import CASES, Case
from conformance.world import RANK, TOLERANCE, Federation, mixed_ranks
from fedllm.federation import HeadPolicy
from fedllm.system import RankRule

HEADS: tuple[HeadPolicy, ...] = ("shared", "local", "frozen")


@dataclass(frozen=True)
class Setup:
    """A row of the table in one kind of federation."""

    case: Case
    mixed: bool = False

    def __str__(self) -> str:
        return f"{self.case}{'-mixed' if self.mixed else ''}"

    @property
    def is_exact(self) -> bool:
        """Whether the specification promises that aggregation loses nothing here."""
        return self.case.exact and (not self.mixed or self.case.mixed_rank == "exact")

    def holds(self, invariant: str) -> bool:
        """Tell whether the specification asks an invariant of it."""
        return not self.case.is_exempt(invariant, mixed=self.mixed)

    def build(self, **options: Any) -> Federation:
        """Return the federation after the rounds that its algorithm needs everyone for."""
        fed = self.start(**options)
        for _ in range(self.case.opening):
            fed.round()
        return fed

    def start(self, **options: Any) -> Federation:
        """Return the federation at its very start."""
        ranks = mixed_ranks() if self.mixed else RankRule((RANK,))
        return Federation(self.case.name, self.case.settings, ranks=ranks, **options)

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return the relative error that the specification allows."""
        if dtype == torch.float32 and self.case.uses_svd:
            return 1e-4
        return TOLERANCE[dtype]


SETUPS = [Setup(case) for case in CASES]
SETUPS += [Setup(case, mixed=True) for case in CASES if case.mixed_rank != "unsupported"]


def each_that_holds(invariant: str) -> pytest.MarkDecorator:
    """Take the setups of which an invariant is asked."""
    return pytest.mark.parametrize("setup", [s for s in SETUPS if s.holds(invariant)], ids=str)


each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_setup = pytest.mark.parametrize("setup", SETUPS, ids=str)
each_head = pytest.mark.parametrize("head", HEADS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
