"""A global model that is shared, and a whole copy that each client trains for itself beside it.

The copy, head included, is kept under the names of the slot `PERSONAL` and trained under its plain
names, alone: the engine never runs both at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fedllm.adapters import slot_of
from fedllm.federation.base import BaseServer
from fedllm.federation.client import BaseClient
from fedllm.federation.messages import ClientId, Job, Payload, Update
from fedllm.federation.protocols import Engine
from fedllm.federation.stages import PERSONAL

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class OwnCopyServer(BaseServer):
    """Averages and sends the global model; every client's copy starts as the first one."""

    is_personal: ClassVar[bool] = True

    def prepare(self) -> None:
        """Put the first copy beside the global model."""
        self.adapter = self.adapter.joined(self.adapter.moved(PERSONAL))

    def is_known(self, name: str, cid: ClientId) -> bool:
        """The first copy follows from the seed, and later ones are the client's own."""
        return slot_of(name) == PERSONAL or super().is_known(name, cid)

    def view(
        self, cid: ClientId | None = None, state: Mapping[str, Tensor] | None = None
    ) -> Payload:
        """Return a client's copy, or the global model."""
        found = super().view(cid, state)
        shown = "" if cid is None else PERSONAL
        return replace(found, adapter=found.adapter.moved("", of=shown))


class OwnCopyClient(BaseClient):
    """Trains the global model, then the copy, and sends the former."""

    def kept(self, name: str, job: Job) -> bool:
        """The copy never leaves the client."""
        return slot_of(name) == PERSONAL or super().kept(name, job)

    def num_passes(self, job: Job, rows_per_step: int) -> float:
        """Return one for the global model and one for the copy."""
        return 2.0

    async def run(self, job: Job, engine: Engine) -> Update:
        """Do both passes over the same batches; figures are those of the global one, steps of both.

        The batches are the same so that each pass is what it would be alone, bit for bit.
        """
        start = self.start(job)
        common = await engine.fit(job, start.moved(""), self)
        now = replace(job, stage=PERSONAL)
        own = await engine.fit(now, start.moved("", of=PERSONAL), self)
        both = common.adapter.joined(own.adapter.moved(PERSONAL))
        steps = common.num_steps + own.num_steps
        return self.update(replace(common, adapter=both, num_steps=steps), job)
