"""A server whose A changes between rounds while only B is trained; late updates follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fedllm.adapters import Adapter, alignment, is_a
from fedllm.federation.base import BaseServer
from fedllm.federation.messages import ClientId, Part, Update

_REMEMBERED = 8
"""How many versions late an update may be."""


@dataclass(kw_only=True)
class LateBasisServer(BaseServer):
    """Remembers A of the last versions, and sends A again only when it has changed."""

    past: dict[int, Adapter] = field(default_factory=dict, init=False)
    """A of the last versions, which late clients have trained with."""

    def is_known(self, name: str, cid: ClientId) -> bool:
        """A travels when it has changed since the client's last download."""
        return (is_a(name) and self.is_unchanged(name, cid)) or super().is_known(name, cid)

    def rebase(self, update: Update) -> Update | None:
        """Bring a late B to today's A, B A_then A_now^+; drop one older than what is remembered."""
        if update.version == self.version:
            return update
        then = self.past.get(update.version)
        if then is None:
            return None
        return replace(update, adapter=alignment.onto_basis(update.adapter, then, self.adapter))

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Average, and remember the A that was trained with."""
        recent = {v: a for v, a in self.past.items() if v > self.version - _REMEMBERED}
        self.past = {**recent, self.version: self.adapter.select(is_a)}
        super().aggregate(parts)
