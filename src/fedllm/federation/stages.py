"""Servers of algorithms that do one thing in some rounds and another in the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedllm.federation.base import EVERYONE_AT_ONCE, BaseServer, together_only
from fedllm.federation.messages import ClientId, Job, Update

if TYPE_CHECKING:
    import numpy as np

PERSONAL = "personal"
"""Stage, or pass, in which a client trains what is its own."""


@dataclass(kw_only=True)
class StagedServer(BaseServer):
    """A server whose `stage` changes on the way; no update counts in another stage than its own."""

    @property
    def is_whole(self) -> bool:
        """Whether everyone takes part in this version, not a sample."""
        return False

    def sample(
        self, pool: Sequence[ClientId], count: int, rng: np.random.Generator
    ) -> Sequence[ClientId]:
        """Choose everyone where the stage asks for that."""
        return list(pool) if self.is_whole else super().sample(pool, count, rng)

    def rebase(self, update: Update, job: Job) -> Update | None:
        """Drop what an earlier stage asked for."""
        return super().rebase(update, job) if update.stage == self.stage else None


@dataclass(kw_only=True)
class RestingServer(StagedServer):
    """A server whose global model rests in the last rounds, while everyone trains its own."""

    is_personal: ClassVar[bool] = True
    refused_schedules: ClassVar[Mapping[str, str]] = together_only(EVERYONE_AT_ONCE)

    @property
    def rest_rounds(self) -> int:
        """How many rounds at the end leave the global model as it is."""
        return 0

    @property
    def stage(self) -> str:
        """The last rounds are personal."""
        return PERSONAL if self.version >= self.rounds - self.rest_rounds else ""

    @property
    def is_whole(self) -> bool:
        """Everyone trains its own."""
        return self.stage == PERSONAL

    def is_known(self, name: str, cid: ClientId) -> bool:
        """While the global model rests, who has it is not sent it again."""
        at_rest = self.stage == PERSONAL and self.is_unchanged(name, cid)
        return at_rest or super().is_known(name, cid)
