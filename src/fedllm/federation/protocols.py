"""What the federation calls and others provide."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fedllm.adapters import Adapter
from fedllm.federation.messages import ClientId, FitResult, Job, Update

if TYPE_CHECKING:
    from torch import Tensor

    from fedllm.federation.client import BaseClient


@dataclass(frozen=True)
class FitRequest:
    """Local training that a job waits for; awaiting it gives a `FitResult`.

    The executor drives the coroutines of a whole cohort up to their requests and hands these to
    `Engine.train` together, so they run in common passes.
    """

    job: Job
    start: Adapter
    client: BaseClient
    tag: str = ""
    is_gradient: bool = False
    """Ask for the gradient at `start` over the whole shard instead of training."""

    def __await__(self) -> Generator[FitRequest, FitResult, FitResult]:
        result = yield self
        return result


class Engine(Protocol):
    """Trains adapters on clients' shards."""

    def fit(
        self, job: Job, start: Adapter, client: BaseClient, *, tag: str = ""
    ) -> Awaitable[FitResult]:
        """Train `start` for `job.steps` steps on the shard of `job.cid`.

        `client` says what is trainable and adds its penalty and correction; `tag` tells apart
        several fits of one job.
        """

    def gradient(
        self, job: Job, start: Adapter, client: BaseClient, *, tag: str = ""
    ) -> Awaitable[FitResult]:
        """Return the gradient of the mean loss over the shard, in place of trained tensors."""

    def train(
        self, requests: Sequence[FitRequest], progress: Progress | None = None
    ) -> list[FitResult]:
        """Serve many fits at once; the results do not depend on which are served together."""


Progress = Callable[[ClientId, int, int], None]
"""Called with (client, steps done, steps to do) while jobs run."""


class Executor(Protocol):
    """Runs jobs, in one process or many; the order of jobs never changes a result."""

    def run(self, jobs: Sequence[Job]) -> list[Update]:
        """Return the update of each job, in the order of `jobs`."""


class StateStore(Protocol):
    """Keeps what clients keep for themselves between rounds."""

    def get(self, cid: ClientId) -> Mapping[str, Tensor]:
        """Return the private tensors of a client; empty if it has none."""

    def put(self, cid: ClientId, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors for a client."""

    def clients(self) -> Iterable[ClientId]:
        """Return the clients that keep something, in ascending order."""
