"""A server whose clients start from nothing, so that what they send is a change by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedllm.adapters import algebra
from fedllm.federation.base import BaseServer
from fedllm.federation.messages import Job, Part, Update


@dataclass(kw_only=True)
class FreshStartServer(BaseServer):
    """Takes late factors as they are: they change any base alike. Its own adapter has B = 0."""

    def rebase(self, update: Update, job: Job) -> Update | None:
        """Bring only heads up to date."""
        return self.heads_rebased(update, job)

    def present(self, parts: Sequence[Part]) -> Update:
        """Return no change at all, for which rank 1 is enough."""
        found = super().present(parts)
        return replace(found, adapter=algebra.truncate(found.adapter, 1))
