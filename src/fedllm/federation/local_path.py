"""A global path that is shared, and a local one beside it that never leaves its client.

Each round may hold a pass over the local path and one over the global path. The head belongs to
the global pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from fedllm.adapters import Adapter, algebra, fresh, slot_of
from fedllm.federation.base import BaseServer
from fedllm.federation.client import BaseClient
from fedllm.federation.messages import ClientId, Job, Mix, Payload, Update
from fedllm.federation.protocols import Engine

if TYPE_CHECKING:
    from torch import Tensor

LOCAL = "local"
"""Slot of the local path, and name of the pass that trains it."""


@dataclass(kw_only=True)
class LocalPathServer(BaseServer):
    """Averages and sends the global path; lends every client the same first local one."""

    is_personal: ClassVar[bool] = True

    def prepare(self) -> None:
        """Put a local path of the same rank beside the global one."""
        self.lend(self.adapter.rank)

    def lend(self, rank: int) -> None:
        """Put a local path beside the global one, with B = 0 and an A of its own."""
        local = self.adapter.body.moved(LOCAL)
        local = algebra.pad(algebra.truncate(local, rank), rank)
        self.adapter = self.adapter.joined(fresh(local, self.seed))

    def download(self, cid: ClientId) -> Payload:
        """Return both paths as they are: all clients have one rank, the local path any."""
        return self.payload(cid, self.adapter)

    def is_known(self, name: str, cid: ClientId) -> bool:
        """The first local path follows from the seed, and later ones are the client's own."""
        return slot_of(name) == LOCAL or super().is_known(name, cid)

    @property
    def mixing(self) -> Mix | None:
        """How a client's view weighs its two paths; None where they simply add up."""
        return None

    def view(
        self, cid: ClientId | None = None, state: Mapping[str, Tensor] | None = None
    ) -> Payload:
        """Return both paths for a client that has trained a local one, else the global path."""
        found = super().view(cid, state)
        if any(slot_of(name) == LOCAL for name in state or {}):
            return replace(found, mix=self.mixing)
        return replace(found, adapter=found.adapter.moved(""))


@dataclass(kw_only=True)
class MixedPathServer(LocalPathServer):
    """A server whose clients' views weigh the two paths for each instance (FedDPA)."""

    strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    """lambda: the largest weight of the local path when answering."""
    references: Annotated[int, Field(ge=1)] = 5
    """Training instances that an instance is compared with."""
    released_mix: bool = False
    """Give the global path the local one's weight when answering, as FedDPA's script does."""

    @property
    def mixing(self) -> Mix | None:
        """Weigh the paths by instance."""
        return Mix("", LOCAL, self.strength, self.references, is_flipped=self.released_mix)


class LocalPathClient(BaseClient):
    """Trains the paths one after the other."""

    def passes(self, job: Job) -> Sequence[str]:
        """Return the passes of a job in order: `LOCAL` for the local path, "" for the global."""
        return (LOCAL, "")

    def num_passes(self, job: Job, rows_per_step: int) -> float:
        """Return how many paths are trained."""
        return float(len(self.passes(job)))

    def active(self, held: Adapter, job: Job) -> Adapter:
        """Return the paths that a pass runs with, and their weights: by default both."""
        return held

    def trainable(self, name: str, job: Job) -> bool:
        """The path that the pass is for is trained, the other is frozen."""
        is_local = slot_of(name) == LOCAL
        return is_local == (job.stage == LOCAL) and super().trainable(name, job)

    def shared(self, name: str, job: Job) -> bool:
        """Only the global path is sent, and only if this job trains it."""
        return "" in self.passes(job) and super().shared(name, job)

    def kept(self, name: str, job: Job) -> bool:
        """The local path is kept from the first job on that trains it."""
        is_trained = slot_of(name) == LOCAL and LOCAL in self.passes(job)
        return is_trained or super().kept(name, job)

    async def run(self, job: Job, engine: Engine) -> Update:
        """Do the passes; figures are those of the global one, if any, steps those of all."""
        held, results = self.start(job), {}
        for stage in self.passes(job):
            now = replace(job, stage=stage)
            results[stage] = await engine.fit(now, self.active(held, now), self, tag=stage)
            held = held.overlaid(results[stage].adapter.tensors)
        figures = results.get("", results.get(LOCAL))
        assert figures is not None
        steps = sum(result.num_steps for result in results.values())
        return self.update(replace(figures, adapter=held, num_steps=steps), job)
