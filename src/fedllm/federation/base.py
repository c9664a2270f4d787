"""The server class that an algorithm overrides: by default it is FedIT (FedAvg on A, B, head)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field

from fedllm.adapters import (
    Adapter,
    BaseDelta,
    Product,
    algebra,
    is_head,
    lateness,
    layer_of,
)
from fedllm.adapters.wire_formats import AS_IS, WireCodec
from fedllm.federation.client import HeadPolicy, held
from fedllm.federation.messages import ClientId, Job, Part, Payload, Update
from fedllm.system import RankRule

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MixedRank = Literal["exact", "projected", "padded", "unsupported"]
NOBODY: ClientId = -1
"""Client of an update that stands for today's model."""
EVERYONE_AT_ONCE = "some of its rounds ask everyone at once"
"""Why an algorithm goes with rounds of all clients only."""
WeightOf = Callable[[str], "Tensor"]
"""The base weight (out, in) of a layer, in fp32."""


def _no_weights(layer: str) -> Tensor:
    raise LookupError(f"nobody has told the server the base weight of {layer}")


def together_only(why: str) -> Mapping[str, str]:
    """Return the schedules that are refused to an algorithm that needs whole rounds, and why."""
    return dict.fromkeys(("buffered", "async", "semi-sync", "sequential"), why)


Count = Annotated[int, Field(ge=1)]
"""A setting of an algorithm that is at least 1."""


@functools.cache
def _setting_names(kind: type[BaseServer]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind) if f.init)


@dataclass(kw_only=True)
class BaseServer:
    """Server side of an algorithm.

    Keyword fields are its settings, under `algorithm:` in the configuration; fields with
    `init=False` are its state and make up its checkpoint, but for what `start` is given.
    """

    mixed_rank: ClassVar[MixedRank] = "unsupported"
    """What happens to clients of unequal rank."""
    is_personal: ClassVar[bool] = False
    """Whether clients have views of their own."""
    recoordinated: ClassVar[str] = ""
    """Why tensors of two rounds or two clients cannot be subtracted from each other; empty where
    they can, so that optimisers, robust means, top-k and privacy are defined."""
    late: ClassVar[Literal["factors", "products"]] = "factors"
    """What of a late update is put onto today's model: the change of factors or of products."""
    refused_schedules: ClassVar[Mapping[str, str]] = {}
    """Schedule to the reason why it is not defined for this algorithm."""
    has_mean: ClassVar[bool] = True
    """Whether what clients trained has a mean that aggregation aims at (`agg_error`)."""
    chosen_of: ClassVar[tuple[str, str] | None] = None
    """Settings that say how many parts, of how many, each client chooses to train."""
    is_random_cohort: ClassVar[bool] = True
    """Whether cohorts are drawn uniformly, as privacy accounting needs."""

    weights: Literal["samples", "uniform"] = "samples"
    """Weigh clients by their number of training rows, or all alike."""
    version: int = field(default=0, init=False)
    """Number of server updates so far."""
    adapter: Adapter = field(default_factory=lambda: Adapter({}), init=False)
    """The global adapter."""
    base: BaseDelta = field(default_factory=BaseDelta, init=False)
    """What has been merged into the base weights."""
    contacts: dict[ClientId, int] = field(default_factory=dict, init=False)
    """Version that each client last downloaded."""
    changed: dict[str, int] = field(default_factory=dict, init=False)
    """Version in which each tensor last changed (absent: never)."""
    ranks: RankRule = field(default=RankRule((1,)), init=False)
    """Given: which rank each client has."""
    head: HeadPolicy = field(default="shared", init=False)
    """Given: what happens to tensors trained in full."""
    num_clients: int = field(default=1, init=False)
    """Given: size of the population."""
    rounds: int = field(default=1, init=False)
    """Given: server updates that the run will make."""
    seed: int = field(default=0, init=False)
    """Given: root of the server's own random choices."""
    weight_of: WeightOf = field(default=_no_weights, init=False, repr=False)
    """Given: the base weights."""
    downlink: WireCodec = field(default=AS_IS, init=False)
    """Given: how increments of the base travel."""

    def start(
        self,
        adapter: Adapter,
        ranks: RankRule,
        head: HeadPolicy = "shared",
        *,
        num_clients: int = 1,
        rounds: int = 1,
        seed: int = 0,
        weight_of: WeightOf = _no_weights,
        downlink: WireCodec = AS_IS,
    ) -> None:
        """Take the common initial adapter, of the largest rank, and what the run is like."""
        self.adapter, self.ranks, self.head = adapter, ranks, head
        self.num_clients, self.rounds, self.seed = num_clients, rounds, seed
        self.weight_of, self.downlink = weight_of, downlink
        self.prepare()

    def prepare(self) -> None:
        """Make the algorithm's first state from the initial adapter; by default that is it."""

    @property
    def is_uneven(self) -> bool:
        """Whether clients of a round train different tensors, so that no two can be compared."""
        if self.chosen_of is None:
            return False
        chosen, of = (getattr(self, name) for name in self.chosen_of)
        return chosen is not None and bool(chosen < of)

    @property
    def stage(self) -> str:
        """The phase that jobs of this version belong to, if the algorithm has several."""
        return ""

    def sample(
        self, pool: Sequence[ClientId], count: int, rng: np.random.Generator
    ) -> Sequence[ClientId]:
        """Choose a cohort: uniformly, without replacement."""
        chosen = rng.choice(len(pool), size=min(count, len(pool)), replace=False).tolist()
        return chosen if pool == range(len(pool)) else [pool[i] for i in chosen]

    def local_run(self, cohort: Iterable[ClientId]) -> Iterable[Job]:
        """Say what each client of the cohort does: one job from its download."""
        settings = {name: getattr(self, name) for name in _setting_names(cast("Any", type(self)))}
        for cid in cohort:
            yield Job(cid=cid, payload=self.download(cid), stage=self.stage, settings=settings)

    def download(self, cid: ClientId) -> Payload:
        """Return what a client receives, at its own rank."""
        adapter, rank = self.adapter, self.ranks.of(cid)
        if rank < adapter.rank:
            adapter = algebra.truncate(adapter, rank)
        return self.payload(cid, adapter)

    def payload(self, cid: ClientId, adapter: Adapter) -> Payload:
        """Wrap what a client starts from, telling what it holds already."""
        return Payload(
            version=self.version,
            adapter=adapter,
            known=frozenset(name for name in adapter if self.is_known(name, cid)),
            base=self.base,
            known_base=self.contacts.get(cid, -1),
        )

    def is_known(self, name: str, cid: ClientId) -> bool:
        """Tell whether a client holds this tensor already, so that it need not travel.

        By default only a head that is never shared: all have it from the start.
        """
        return is_head(name) and self.head != "shared"

    def is_unchanged(self, name: str, cid: ClientId) -> bool:
        """Tell whether a tensor has not changed since the client last downloaded."""
        return self.contacts.get(cid, -1) >= self.changed.get(name, 0)

    def weight(self, update: Update) -> float:
        """Return how much an update counts, before weights are made to sum to 1."""
        return float(update.num_samples) if self.weights == "samples" else 1.0

    def rebase(self, update: Update, job: Job) -> Update | None:
        """Bring a late update into today's coordinates; None drops it.

        By default, and where factors cannot be subtracted (`late`), what its client changed is put
        onto what that client would download today.

        Args:
            update: What its client made of an earlier version.
            job: What it answers; its payload is what the client started from.
        """
        start = job.payload.adapter
        if self.late == "products":
            whole = lateness.products_onto(update.adapter, start, self.adapter)
            return replace(update, adapter=whole)
        now = self.download(update.cid).adapter
        changed = lateness.change_onto(update.adapter, start.tensors, now.tensors)
        return replace(update, adapter=changed)

    def heads_rebased(self, update: Update, job: Job) -> Update:
        """Bring what is trained in full up to date, and leave the rest as it is."""
        start, now = job.payload.adapter.tensors, self.adapter.tensors
        heads = lateness.change_onto(update.adapter.select(is_head), start, now)
        return replace(update, adapter=update.adapter.overlaid(heads.tensors))

    def present(self, parts: Sequence[Part]) -> Update:
        """Return today's model as a participant: the tensors that the others sent."""
        sent = {name for part in parts for name in part.update.adapter}
        now = self.adapter.select(sent.__contains__)
        return Update(NOBODY, self.version, now, num_samples=0, num_steps=0, stage=self.stage)

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Make the next global state from one or more weighted updates."""
        self.adapter = self.adapter.overlaid(algebra.mean(weighted(parts), self.adapter))

    def average_heads(self, parts: Sequence[Part]) -> None:
        """Average what is trained in full, for methods that treat factors otherwise."""
        sent = [(w, a.select(is_head)) for w, a in weighted(parts)]
        self.adapter = self.adapter.overlaid(algebra.mean(sent, self.adapter))

    def merge(self, increment: Mapping[str, Product]) -> None:
        """Add a low-rank increment to the base weights; the only way they ever change."""
        if increment:
            layers = {layer_of(path): product for path, product in increment.items()}
            self.base = self.base.merged(self.version + 1, layers, self.downlink)

    def apply(self, parts: Sequence[Part]) -> None:
        """Aggregate what there is, and count one more version."""
        before = self.adapter
        if parts:
            self.aggregate(parts)
        self.version += 1
        for name in self.adapter:
            if name not in before or self.adapter[name] is not before[name]:
                self.changed[name] = self.version

    def view(
        self, cid: ClientId | None = None, state: Mapping[str, Tensor] | None = None
    ) -> Payload:
        """Return what evaluation and export load: the global view, or client `cid`'s.

        Args:
            cid: Whose view; None is the global one.
            state: The client's private tensors, laid over what the server knows of it.
        """
        if cid is None:
            return Payload(self.version, self.adapter, base=self.base)
        own = held(self.download(cid).adapter, state or {})
        return Payload(self.version, own, base=self.base)


def weighted(parts: Sequence[Part]) -> list[tuple[float, Adapter]]:
    """Return weights and adapters of the parts, as the algebra takes them."""
    return [(part.weight, part.update.adapter) for part in parts]
