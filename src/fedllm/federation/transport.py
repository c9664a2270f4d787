"""What codecs make of messages: the tensors as they arrive, and the bytes that travelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedllm.adapters import note
from fedllm.adapters.wire import codec_for, send_change
from fedllm.adapters.wire_formats import AS_IS, WireCodec
from fedllm.federation.base import BaseServer
from fedllm.federation.client import BaseClient
from fedllm.federation.messages import Job, Payload, Update

if TYPE_CHECKING:
    from torch import Tensor

_NEVER_SEEN = -1
"""A client id that no client has: what it knows, all know from the common seed."""
_OWED = "owed"


@dataclass(frozen=True)
class Transport:
    """How messages travel in both directions."""

    uplink: WireCodec = AS_IS
    downlink: WireCodec = AS_IS

    def send_down(self, payload: Payload, server: BaseServer) -> Payload:
        """Return the payload as it arrives.

        What all know from the seed does not travel and stays exact. What a client holds from an
        earlier round it holds as that round's codec brought it, which is what a round trip gives.
        """
        if self.downlink.is_lossless:
            return payload
        tensors = {
            name: tensor if server.is_known(name, _NEVER_SEEN) else self._arrived(tensor)
            for name, tensor in payload.adapter.tensors.items()
        }
        extra = {name: self._arrived(tensor) for name, tensor in payload.extra.items()}
        return replace(payload, adapter=replace(payload.adapter, tensors=tensors), extra=extra)

    def down_nbytes(self, payload: Payload) -> int:
        """Return the bytes of a payload.

        The increments of the base were packed when they were merged. Where their sum is smaller, it
        travels as it is: packed once more, it would be another base.
        """
        base = payload.base.nbytes_since(payload.known_base)
        return _nbytes(payload.sent, self.downlink) + base

    def up_nbytes(self, client: BaseClient, job: Job) -> int:
        """Return the bytes a client will send: known from names and shapes, before training."""
        start = job.payload.adapter
        sent = {name: start[name] for name in start if client.shared(name, job)}
        extra = {note("extra", name): start[name] for name in client.extra_names(job)}
        return _nbytes({**sent, **extra}, self.uplink)

    def send_up(self, update: Update, job: Job) -> tuple[Update, int]:
        """Return an update as it arrives, and the bytes that travelled.

        A codec that drops most of a value sends the change against the download instead, and the
        client keeps what it owes among its private notes.
        """
        nbytes = update.nbytes
        if self.uplink.is_lossless:
            return update, nbytes
        nbytes = _nbytes(_flat(update), self.uplink)
        if self.uplink.needs_reference:
            return self._send_changes(update, job), nbytes
        tensors = {n: self._rounded(t) for n, t in update.adapter.tensors.items()}
        extra = {n: self._rounded(t) for n, t in update.extra.items()}
        return replace(update, adapter=update.adapter.overlaid(tensors), extra=extra), nbytes

    def _send_changes(self, update: Update, job: Job) -> Update:
        """Extras are changes already; the model's tensors become changes for the way."""
        start = job.payload.adapter
        changes = {n: t - start[n] for n, t in update.adapter.tensors.items()}
        changes |= {note("extra", n): t for n, t in update.extra.items()}
        prefix = note(_OWED, "")
        owed = {n.removeprefix(prefix): t for n, t in job.state.items() if n.startswith(prefix)}
        sent, owed = send_change(self.uplink, changes, owed)
        tensors = {n: start[n] + sent[n] for n in update.adapter}
        return replace(
            update,
            adapter=update.adapter.overlaid(tensors),
            extra={n: sent[note("extra", n)] for n in update.extra},
            state={**update.state, **{note(_OWED, n): t for n, t in owed.items()}},
        )

    def _arrived(self, tensor: Tensor) -> Tensor:
        return codec_for(self.downlink, tensor.dtype).round_trip(tensor)

    def _rounded(self, tensor: Tensor) -> Tensor:
        return codec_for(self.uplink, tensor.dtype).round_trip(tensor)


def _flat(update: Update) -> dict[str, Tensor]:
    extra = {note("extra", name): tensor for name, tensor in update.extra.items()}
    return {**update.adapter.tensors, **extra}


def _nbytes(tensors: Mapping[str, Tensor], codec: WireCodec) -> int:
    return sum(
        codec_for(codec, t.dtype).nbytes(tuple(t.shape), t.element_size()) for t in tensors.values()
    )
