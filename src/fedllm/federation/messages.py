"""What passes between server and clients: frozen, picklable, complete.

Running a `Job` on a client's shard gives an `Update`, and nothing else is needed or changed: no
message refers to a live server, client or model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fedllm.adapters import Adapter, BaseDelta, note

if TYPE_CHECKING:
    from torch import Tensor

ClientId = int
_new, _set = object.__new__, object.__setattr__
"""What `Job.filled` makes a frozen message with."""


@dataclass(frozen=True)
class Mix:
    """How a view weighs two of its paths for each instance it is asked about (FedDPA).

    The weight of `local` is strength * c, c being the mean cosine similarity between the last
    hidden state of the instance and those of some of the client's training instances.
    """

    common: str
    """Slot of the path that gets the rest of the weight."""
    local: str
    """Slot of the path that is also active when hidden states are computed."""
    strength: float
    """lambda, from 0 to 1."""
    references: int
    """How many training instances are compared with."""
    is_flipped: bool = False
    """Give `common` the weight of `local`, as FedDPA's released script does."""

    @property
    def shares(self) -> dict[str, float]:
        """The weights of an instance just like the client's own: all that a file can say."""
        local = 1.0 - self.strength if self.is_flipped else self.strength
        return {self.common: 1.0 - local, self.local: local}


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
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What travels beside the model, under the names of the tensors it belongs to."""
    mix: Mix | None = None
    """How a personal view weighs its paths, if by instance."""

    @property
    def nbytes(self) -> int:
        """Bytes that travel down: the tensors not known, and the missing part of the base."""
        return sum(t.nbytes for t in self.sent.values()) + self.base.nbytes_since(self.known_base)

    @property
    def sent(self) -> dict[str, Tensor]:
        """The tensors that travel, extras under names of their own."""
        extras = {note("extra", name): tensor for name, tensor in self.extra.items()}
        return {**{n: t for n, t in self.adapter.tensors.items() if n not in self.known}, **extras}


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
    planned_steps: int = 0
    """Steps that the local learning-rate schedule is laid out for, when a window cuts a job short;
    0: as many as `steps`."""
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

    def filled(self, **more: Any) -> Job:
        """Return a copy with some fields set: `dataclasses.replace`, at a fifth of its cost."""
        made = _new(Job)
        # a dictionary of its own: attributes are read three times as fast as from a shared layout
        _set(made, "__dict__", {**self.__dict__, **more})
        return made


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
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What travels beside the model, under the names of the tensors it belongs to."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """`loss` (mean per supervised token, pair or rated row over all steps), `tokens`, ..."""

    @property
    def nbytes(self) -> int:
        """Bytes that travel up."""
        return self.adapter.nbytes + sum(t.nbytes for t in self.extra.values())


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
