"""Lines of a trace that cannot be read: counted, the first of them named, and too many refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.errors import DataError

NAMED = 10
"""Problems that are told one by one."""


@dataclass
class Problems:
    """What was wrong with a file."""

    path: Path
    count: int = 0
    lines: int = 0
    """Read in all."""
    named: list[str] = field(default_factory=list)
    unknown_events: Counter[str] = field(default_factory=Counter)
    """Events that mean nothing to us, and how often; their lines are not wrong."""

    def add(self, line: int | str, reason: str) -> None:
        """Take note of a line."""
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(f"{self.path}:{line}: {reason}")

    def check(self, limit: float) -> None:
        """Refuse a file of which more than a share is wrong.

        Raises:
            DataError: With the first lines that are.
        """
        if self.lines and self.count > limit * self.lines:
            more = f"\n... and {self.count - len(self.named)} more" * (self.count > NAMED)
            raise DataError(
                f"{self.count} of {self.lines} lines of {self.path} cannot be read, more than"
                f" {limit:.0%}:\n" + "\n".join(self.named) + more + "\nMend them, or allow more"
                " with --malformed SHARE"
            )
