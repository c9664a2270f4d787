"""A server whose A changes between rounds while only B is trained; late updates follow."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedllm.adapters import alignment, is_a, lateness
from fedllm.federation.base import BaseServer
from fedllm.federation.messages import ClientId, Job, Update


@dataclass(kw_only=True)
class LateBasisServer(BaseServer):
    """Sends A again only when it has changed, and brings late changes of B to today's A."""

    def is_known(self, name: str, cid: ClientId) -> bool:
        """A travels when it has changed since the client's last download."""
        return (is_a(name) and self.is_unchanged(name, cid)) or super().is_known(name, cid)

    def rebase(self, update: Update, job: Job) -> Update | None:
        """Put a late change of B onto today's: B_now + (B - B_then) A_then A_now^+."""
        start, now = job.payload.adapter, self.download(update.cid).adapter
        nothing = {name: start[name] * 0.0 for name in update.adapter}
        change = lateness.change_onto(update.adapter, start.tensors, nothing)
        brought = alignment.onto_basis(change, start, now)
        return replace(update, adapter=lateness.change_onto(brought, nothing, now.tensors))
