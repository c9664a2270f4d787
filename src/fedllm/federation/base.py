"""The two classes an algorithm overrides: by default they are FedIT (FedAvg on A, B and head)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from fedllm.adapters import Adapter, BaseDelta, Product, algebra, is_head, is_note, layer_of
from fedllm.adapters.wire_formats import AS_IS, WireCodec
from fedllm.federation.messages import ClientId, FitResult, Job, Part, Payload, Update
from fedllm.federation.protocols import Engine
from fedllm.system import RankRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor

MixedRank = Literal["exact", "projected", "padded", "unsupported"]
HeadPolicy = Literal["shared", "local", "frozen"]
WeightOf = Callable[[str], "Tensor"]
"""The base weight (out, in) of a layer, in fp32."""


def _no_weights(layer: str) -> Tensor:
    raise LookupError(f"nobody has told the server the base weight of {layer}")


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
    has_mean: ClassVar[bool] = True
    """Whether what clients trained has a mean that aggregation aims at (`agg_error`)."""
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
    def stage(self) -> str:
        """The phase that jobs of this version belong to, if the algorithm has several."""
        return ""

    def sample(
        self, pool: Sequence[ClientId], count: int, rng: np.random.Generator
    ) -> Sequence[ClientId]:
        """Choose a cohort: uniformly, without replacement."""
        chosen = rng.choice(len(pool), size=min(count, len(pool)), replace=False)
        return [pool[int(i)] for i in chosen]

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

    def rebase(self, update: Update) -> Update | None:
        """Bring a stale update into today's coordinates; None drops it."""
        return update

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


class BaseClient:
    """Client side of an algorithm: behaviour only, no data, no weights, no identity.

    Args:
        head: What happens to tensors trained in full.
    """

    def __init__(self, head: HeadPolicy = "shared") -> None:
        self.head = head

    def trainable(self, name: str, job: Job) -> bool:
        """Tell whether a tensor is trained; it gets no gradient and no decay otherwise."""
        return not (is_head(name) and self.head == "frozen")

    def shared(self, name: str, job: Job) -> bool:
        """Tell whether a tensor is uploaded: by default what is trainable and not kept."""
        return self.trainable(name, job) and not self.kept(name, job)

    def kept(self, name: str, job: Job) -> bool:
        """Tell whether a tensor stays with the client: by default only a local head."""
        return is_head(name) and self.head == "local"

    def extra_names(self, job: Job) -> Iterable[str]:
        """Return the tensors beside which something else is uploaded, of the same size."""
        return ()

    def num_passes(self, job: Job, rows_per_step: int) -> float:
        """Return how many times `job.steps` steps are trained, for the cost model."""
        return 1.0

    def penalty(self, live: Mapping[str, Tensor], job: Job) -> Tensor | None:
        """Return a differentiable term added to the task loss, from the trainable tensors."""
        return None

    def correct(self, grads: Mapping[str, Tensor], job: Job) -> Mapping[str, Tensor] | None:
        """Return changed gradients of the trainable tensors, or None to leave them."""
        return None

    def start(self, job: Job) -> Adapter:
        """Return the adapter training starts from: the download, private tensors over it."""
        return held(job.payload.adapter, job.state)

    def finish(self, trained: Adapter, job: Job) -> Adapter:
        """Return what is uploaded of the trained adapter."""
        return trained.select(lambda name: self.shared(name, job))

    async def run(self, job: Job, engine: Engine) -> Update:
        """Train once and return what is shared; what is kept goes into the private state."""
        result = await engine.fit(job, self.start(job), self)
        return self.update(result, job)

    def update(self, result: FitResult, job: Job) -> Update:
        """Divide what was trained into what is sent and what is kept."""
        kept = result.adapter.select(lambda name: self.kept(name, job))
        return Update(
            cid=job.cid,
            version=job.version,
            stage=job.stage,
            adapter=self.finish(result.adapter, job),
            num_samples=job.num_samples,
            num_steps=result.num_steps,
            state=dict(kept.tensors),
            metrics=result.metrics,
        )


def weighted(parts: Sequence[Part]) -> list[tuple[float, Adapter]]:
    """Return weights and adapters of the parts, as the algebra takes them."""
    return [(part.weight, part.update.adapter) for part in parts]


def held(adapter: Adapter, state: Mapping[str, Tensor]) -> Adapter:
    """Lay private tensors over an adapter: not the notes, nor what an earlier stage kept."""
    return adapter.overlaid({name: t for name, t in state.items() if name in adapter})


def visible(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the private tensors that are part of the model, not notes beside it."""
    return {name: tensor for name, tensor in state.items() if not is_note(name)}
