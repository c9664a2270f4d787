"""Control variates: what the server and each client know of the mean gradient (SCAFFOLD, ILoRA).

The server's c travels down and the change of a client's c_k travels up, both beside the model and
counted; c_k stays with the client as a note.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from fedllm.adapters import Adapter, linear, note
from fedllm.federation.base import BaseServer
from fedllm.federation.client import BaseClient
from fedllm.federation.local_path import LOCAL
from fedllm.federation.messages import ClientId, FitResult, Job, Part, Payload, Update
from fedllm.federation.protocols import Engine, FitRequest, Progress
from fedllm.federation.stages import PERSONAL

if TYPE_CHECKING:
    from torch import Tensor

_CONTROL = "control"
_NOBODY = -1
"""A client id that no client has: what it knows, all know from the common seed."""


def is_own_pass(job: Job) -> bool:
    """Tell whether a pass trains what is the client's own, which nothing of the server's steers."""
    return _is_own(job.stage)


def _is_own(stage: str) -> bool:
    return stage in (PERSONAL, LOCAL)


@dataclass(kw_only=True)
class ControlServer(BaseServer):
    """Sends c with every download, and moves it by what clients report."""

    control: dict[str, Tensor] = field(default_factory=dict, init=False)
    """c, of every tensor that travels; 0 at first."""

    def prepare(self) -> None:
        """Start all that travels at c = 0."""
        super().prepare()
        here = {n: t for n, t in self.adapter.tensors.items() if not self.is_known(n, _NOBODY)}
        self.control = linear.zeros_like(here)

    def payload(self, cid: ClientId, adapter: Adapter) -> Payload:
        """Add c, at the client's rank; nobody needs it where all train what is their own."""
        found = super().payload(cid, adapter)
        if _is_own(self.stage):
            return found
        return replace(found, extra=linear.truncated_to(self.control, adapter.tensors))

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Aggregate as the method does, then c <- c + (1 / N) sum_k (c_k+ - c_k)."""
        super().aggregate(parts)
        self.renew(parts)

    def renew(self, parts: Sequence[Part]) -> None:
        """Move c by what the clients report; who did not train a tensor leaves its c_k as it is."""
        zero = Adapter(linear.zeros_like(self.control), self.adapter.scaling)
        sent = [(1.0, Adapter(part.update.extra, self.adapter.scaling)) for part in parts]
        mean = linear.mean_padded(sent, zero)
        senders = {n: sum(n in part.update.extra for part in parts) for n in mean}
        change = {n: t * (senders[n] / self.num_clients) for n, t in mean.items()}
        self.control = linear.add(self.control, change)


class SharedPass(NamedTuple):
    """The pass of a job over what is shared."""

    job: Job
    start: Adapter
    """x_t, among all that is active in this pass."""
    result: FitResult


@dataclass
class _Watched:
    """An engine that remembers the pass over what is shared: a method may do others beside it."""

    engine: Engine
    seen: SharedPass | None = None

    async def fit(
        self, job: Job, start: Adapter, client: BaseClient, *, tag: str = ""
    ) -> FitResult:
        """Train, and remember it."""
        result = await self.engine.fit(job, start, client, tag=tag)
        if self.seen is None and not is_own_pass(job):
            self.seen = SharedPass(job, start, result)
        return result

    def gradient(
        self, job: Job, start: Adapter, client: BaseClient, *, tag: str = ""
    ) -> Awaitable[FitResult]:
        """Ask for a gradient."""
        return self.engine.gradient(job, start, client, tag=tag)

    def train(
        self, requests: Sequence[FitRequest], progress: Progress | None = None
    ) -> list[FitResult]:
        """Serve many fits."""
        return self.engine.train(requests, progress)


class ControlClient(BaseClient):
    """Adds c - c_k to its gradients, and renews c_k when it has trained."""

    def extra_names(self, job: Job) -> Iterable[str]:
        """A change of c_k goes up with every tensor that does."""
        return [n for n in job.payload.extra if self.shared(n, job)]

    def correct(self, grads: Mapping[str, Tensor], job: Job) -> Mapping[str, Tensor] | None:
        """Return g + c - c_k."""
        own = super().correct(grads, job)
        found = grads if own is None else own
        if is_own_pass(job):
            return own
        return linear.subtract(linear.add(found, job.payload.extra), controls(job))

    def num_passes(self, job: Job, rows_per_step: int) -> float:
        """Add the gradient over the whole shard that renews c_k."""
        trained = super().num_passes(job, rows_per_step)
        if not job.payload.extra or not self.takes_gradient(job):
            return trained
        return trained + job.num_samples / max(job.steps * rows_per_step, 1)

    def takes_gradient(self, job: Job) -> bool:
        """Tell whether c_k is renewed by a gradient over the whole shard."""
        return True

    async def renewed(self, done: SharedPass, engine: Engine) -> Mapping[str, Tensor]:
        """Return c_k+: by default the gradient over the whole shard at the download (option I)."""
        found = await engine.gradient(done.job, done.start, self, tag=_CONTROL)
        return found.adapter.tensors

    async def run(self, job: Job, engine: Engine) -> Update:
        """Train as the method does, then renew c_k and report by how much it changed."""
        watched = _Watched(engine)
        update = await super().run(job, watched)
        if watched.seen is None or not job.payload.extra:
            return update
        before = controls(job)
        renewed = await self.renewed(watched.seen, engine)
        after = {n: renewed[n] for n in self.extra_names(job) if n in renewed}
        change = {n: t - before[n] if n in before else t for n, t in after.items()}
        kept = {note(_CONTROL, n): t for n, t in {**before, **after}.items()}
        return replace(update, extra=change, state={**update.state, **kept})


def controls(job: Job) -> dict[str, Tensor]:
    """Return a client's c_k, by the names of the tensors."""
    prefix = note(_CONTROL, "")
    return {n.removeprefix(prefix): t for n, t in job.state.items() if n.startswith(prefix)}
