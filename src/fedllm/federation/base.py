"""The two classes an algorithm overrides: by default they are FedIT (FedAvg on A, B and head)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar, Literal

from fedllm.adapters import Adapter, BaseDelta, Product, algebra, is_head
from fedllm.federation.messages import ClientId, Job, Part, Payload, Update
from fedllm.federation.protocols import Engine
from fedllm.system import RankRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor

MixedRank = Literal["exact", "projected", "padded", "unsupported"]
HeadPolicy = Literal["shared", "local", "frozen"]


@dataclass(kw_only=True)
class BaseServer:
    """Server side of an algorithm.

    Keyword fields are its settings, under `algorithm:` in the configuration; fields with
    `init=False` are its state and make up its checkpoint.
    """

    mixed_rank: ClassVar[MixedRank] = "unsupported"
    """What happens to clients of unequal rank."""
    is_personal: ClassVar[bool] = False
    """Whether clients keep tensors that make a view of their own."""

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
    """Which rank each client has."""
    head: HeadPolicy = field(default="shared", init=False)
    """What happens to tensors trained in full."""

    def start(self, adapter: Adapter, ranks: RankRule, head: HeadPolicy = "shared") -> None:
        """Take the common initial adapter, of the largest rank."""
        self.adapter, self.ranks, self.head = adapter, ranks, head

    def sample(
        self, pool: Sequence[ClientId], count: int, rng: np.random.Generator
    ) -> Sequence[ClientId]:
        """Choose a cohort: uniformly, without replacement."""
        chosen = rng.choice(len(pool), size=min(count, len(pool)), replace=False)
        return [pool[int(i)] for i in chosen]

    def local_run(self, cohort: Iterable[ClientId]) -> Iterable[Job]:
        """Say what each client of the cohort does: one job from its download."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for cid in cohort:
            yield Job(cid=cid, payload=self.download(cid), settings=settings)

    def download(self, cid: ClientId) -> Payload:
        """Return what a client receives, at its own rank."""
        adapter, rank = self.adapter, self.ranks.of(cid)
        return Payload(
            version=self.version,
            adapter=algebra.truncate(adapter, rank) if rank < adapter.rank else adapter,
            known=frozenset(name for name in adapter if self.is_known(name, cid)),
            base=self.base,
            known_base=self.contacts.get(cid, -1),
        )

    def is_known(self, name: str, cid: ClientId) -> bool:
        """Tell whether a client holds this tensor already, so that it need not travel.

        By default only a head that is never shared: all have it from the start.
        """
        return is_head(name) and self.head != "shared"

    def weight(self, update: Update) -> float:
        """Return how much an update counts, before weights are made to sum to 1."""
        return float(update.num_samples) if self.weights == "samples" else 1.0

    def rebase(self, update: Update) -> Update | None:
        """Bring a stale update into today's coordinates; None drops it."""
        return update

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Make the next global state from one or more weighted updates."""
        self.adapter = self.adapter.overlaid(algebra.mean(weighted(parts), self.adapter))

    def merge(self, increment: Mapping[str, Product]) -> None:
        """Add a low-rank increment to the base weights; the only way they ever change."""
        self.base = self.base.merged(self.version + 1, increment)

    def apply(self, parts: Sequence[Part]) -> None:
        """Aggregate, and count one more version."""
        before = self.adapter
        self.aggregate(parts)
        self.version += 1
        for name in self.adapter:
            if name not in before or self.adapter[name] is not before[name]:
                self.changed[name] = self.version

    def view(self, cid: ClientId | None = None) -> Payload:
        """Return what evaluation and export load: the global view, or client `cid`'s.

        A client's view is what the server knows of it; its private tensors are laid over that.
        """
        adapter = self.adapter if cid is None else self.download(cid).adapter
        return Payload(self.version, adapter, base=self.base)


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

    def penalty(self, live: Mapping[str, Tensor], job: Job) -> Tensor | None:
        """Return a differentiable term added to the task loss, from the trainable tensors."""
        return None

    def correct(self, grads: Mapping[str, Tensor], job: Job) -> Mapping[str, Tensor] | None:
        """Return changed gradients of the trainable tensors, or None to leave them."""
        return None

    def start(self, job: Job) -> Adapter:
        """Return the adapter training starts from: the download, private tensors over it."""
        return job.payload.adapter.overlaid(job.state)

    async def run(self, job: Job, engine: Engine) -> Update:
        """Train once and return what is shared; what is kept goes into the private state."""
        result = await engine.fit(job, self.start(job), self)
        kept = result.adapter.select(lambda name: self.kept(name, job))
        return Update(
            cid=job.cid,
            version=job.version,
            stage=job.stage,
            adapter=result.adapter.select(lambda name: self.shared(name, job)),
            num_samples=job.num_samples,
            num_steps=result.num_steps,
            state=dict(kept.tensors),
            metrics=result.metrics,
        )


def weighted(parts: Sequence[Part]) -> list[tuple[float, Adapter]]:
    """Return weights and adapters of the parts, as the algebra takes them."""
    return [(part.weight, part.update.adapter) for part in parts]
