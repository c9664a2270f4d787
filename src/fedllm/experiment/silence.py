"""A watch that nobody looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedllm.experiment.parts import Parts
    from fedllm.results import RunDir


class Silent:
    """Implements `experiment.run.Watch` and does nothing."""

    def say(self, text: str) -> None:
        """Ignore what is being done."""

    def begin(self, parts: Parts, run: RunDir) -> None:
        """Ignore that everything is loaded."""

    def step(self, cid: int, done: int, total: int) -> None:
        """Ignore a client's progress."""

    def answered(self, count: int) -> None:
        """Ignore how many answers there are."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Ignore a round's metrics."""
