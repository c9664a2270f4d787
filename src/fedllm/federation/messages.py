"""What passes between server and clients: frozen, picklable, complete.

Running a `Job` on a client's shard gives an `Update`, and nothing else is needed or changed: no
message refers to a live server, client or model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fedllm.adapters import Adapter, BaseDelta

if TYPE_CHECKING:
    from torch import Tensor

ClientId = int


@dataclass(frozen=True)
class Payload:
    """What a client starts from. Only what it does not hold already travels."""

    version: int
    """Number of server updates behind it."""
    adapter: Adapter
    """All tensors the client starts from."""
    known: frozenset[str] = frozenset()
    """Tensors the client holds already (from the common seed or an earlier round)."""
    base: BaseDelta = field(default_factory=BaseDelta)
    """What has been merged into the base weights."""
    known_base: int = -1
    """Version of the base that the client holds."""

    @property
    def nbytes(self) -> int:
        """Bytes that travel down: the tensors not known, and the missing part of the base."""
        sent = self.adapter.select(lambda name: name not in self.known)
        return sent.nbytes + self.base.nbytes_since(self.known_base)


@dataclass(frozen=True)
class Job:
    """One client's work: everything `run` needs besides the client's own data."""

    cid: ClientId
    payload: Payload
    stage: str = ""
    """The algorithm's phase, if it has several."""
    seed: int = 0
    """Root of all randomness in this job: data order, dropout, fresh factors."""
    steps: int = 0
    """Optimiser steps to do."""
    learning_rate: float = 0.0
    """Peak learning rate of this round."""
    num_samples: int = 0
    """Rows of training data the client has."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """The client's private tensors, checked out of the state store."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The algorithm's settings, for what a client does with them."""

    @property
    def version(self) -> int:
        """The server version the job starts from."""
        return self.payload.version


@dataclass(frozen=True)
class Update:
    """What comes back from a job."""

    cid: ClientId
    version: int
    """The server version the job started from."""
    adapter: Adapter
    """The tensors that travel up."""
    num_samples: int
    """Rows of training data behind it."""
    num_steps: int
    """Optimiser steps done."""
    stage: str = ""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """Private tensors to keep for the client; never sent."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """`loss` (mean per supervised token over all steps), `tokens`, ..."""

    @property
    def nbytes(self) -> int:
        """Bytes that travel up."""
        return self.adapter.nbytes


class Part(NamedTuple):
    """An update with the weight it has in this aggregation."""

    weight: float
    update: Update


@dataclass(frozen=True)
class FitResult:
    """What the engine returns from local training."""

    adapter: Adapter
    """The starting adapter with its trained tensors replaced."""
    num_steps: int
    metrics: Mapping[str, float]
