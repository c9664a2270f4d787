"""A client's own path beside the frozen mean of all other clients', and a router over both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from fedllm.adapters import (
    Adapter,
    Pool,
    Routing,
    algebra,
    experts,
    in_slot,
    is_head,
    is_router,
    slot_of,
)
from fedllm.federation.base import NOBODY, BaseServer
from fedllm.federation.client import BaseClient
from fedllm.federation.messages import ClientId, Job, Part, Payload, Update

if TYPE_CHECKING:
    from torch import Tensor

REST = "rest"
"""Slot of the path that is the mean of all others."""


@dataclass(kw_only=True)
class RestPathServer(BaseServer):
    """Keeps what each client sent last, and sends each client the mean of the others."""

    is_personal: ClassVar[bool] = True
    has_mean: ClassVar[bool] = False

    pool: Pool = field(default_factory=Pool, init=False)
    """The latest own path of each client."""

    def prepare(self) -> None:
        """Put a rest of the world beside the own path, with B = 0, and a router over both."""
        paths = self.adapter.body
        whole = self.adapter.joined(paths.moved(REST))
        whole = whole.overlaid(experts.routers(paths, 2, self.seed))
        self.adapter = replace(whole, routing=Routing((REST, ""), top=2))

    def is_known(self, name: str, cid: ClientId) -> bool:
        """Own path and router follow from the seed, and later ones are the client's own."""
        is_own = slot_of(name) != REST and not is_head(name)
        return is_own or super().is_known(name, cid)

    def download(self, cid: ClientId) -> Payload:
        """Return the mean of what all others sent last."""
        rest = {in_slot(name, REST): t for name, t in self.pool.mean_without(cid).items()}
        return self.payload(cid, self.adapter.overlaid(rest))

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Replace what each client sent last, in the server's scaling; average heads."""
        for _, update in parts:
            if update.cid == NOBODY:
                continue
            sent = algebra.mean([(1.0, update.adapter.body)], self.adapter)
            _, before = self.pool.members.get(update.cid, (0.0, self._own))
            latest = before.overlaid(sent)
            self.pool = self.pool.with_member(update.cid, self.weight(update), latest)
        self.average_heads(parts)

    def rebase(self, update: Update, job: Job) -> Update | None:
        """A late own path is the latest all the same; heads are brought up to date."""
        return self.heads_rebased(update, job)

    def view(
        self, cid: ClientId | None = None, state: Mapping[str, Tensor] | None = None
    ) -> Payload:
        """Return a client's paths and router, or the mean of all own paths as a plain adapter."""
        found = super().view(cid, state)
        if cid is not None:
            return found
        heads = self.adapter.select(is_head).tensors
        return replace(found, adapter=self._own.overlaid({**self.pool.mean_without(None), **heads}))

    @property
    def _own(self) -> Adapter:
        """The first own path, which clients that never took part still have."""
        plain = self.adapter.body.moved("").select(lambda name: not is_router(name))
        return replace(plain, routing=None)


class RestPathClient(BaseClient):
    """Trains its own path and its router; sends the path, and keeps both."""

    def trainable(self, name: str, job: Job) -> bool:
        """The rest of the world is frozen."""
        return slot_of(name) != REST and super().trainable(name, job)

    def shared(self, name: str, job: Job) -> bool:
        """The own path is sent although it is kept; the router is not."""
        if is_head(name):
            return super().shared(name, job)
        return self.trainable(name, job) and not is_router(name)

    def kept(self, name: str, job: Job) -> bool:
        """No download replaces the own path or the router."""
        is_own = slot_of(name) != REST and not is_head(name)
        return is_own or super().kept(name, job)
