"""Which LoRA rank a client has."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.seeding import rng


@dataclass(frozen=True)
class RankRule:
    """One rank for all, or one of several drawn from (seed, client)."""

    choices: tuple[int, ...]
    """The ranks there are."""
    seed: int = 0

    @property
    def largest(self) -> int:
        """The rank of the server's adapter."""
        return max(self.choices)

    @property
    def is_mixed(self) -> bool:
        """Whether clients may differ."""
        return len(set(self.choices)) > 1

    def of(self, cid: int) -> int:
        """Return the rank of a client."""
        if not self.is_mixed:
            return self.choices[0]
        return int(rng(self.seed, "rank", cid).choice(self.choices))
