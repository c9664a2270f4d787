"""Worlds and loops for tests of the event loop, over the exact federation of `conformance`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conformance.setups import Setup
from conformance.world import NUM_SAMPLES, FakeEngine, Federation

from fedllm.config import TrainingConfig
from fedllm.executors import InlineExecutor
from fedllm.federation import FitRequest, FitResult, Plan, Progress
from fedllm.simulation import EventQueue, Loop, Population, Round, Schedule, Sync
from fedllm.system import Ideal, Work, World

PERIOD_S = 100.0


@dataclass(frozen=True)
class Slow(World):
    """Client k is there from 7 k s to 7 k + 60 s of every 100 s; everything takes time."""

    pace: Mapping[int, float] = field(default_factory=dict)
    """Seconds of a local step of each client; 1 where not given."""
    absent: frozenset[int] = frozenset()
    """Clients that never come."""
    leaves: Mapping[int, float] = field(default_factory=dict)
    """Seconds of work after which a client drops out of each of its jobs."""
    open_s: float = 60.0
    """Length of a window."""
    cells: Mapping[int, int] = field(default_factory=dict)
    """Client to its cell."""

    def window(self, cid: int, time_s: float) -> tuple[float, float] | None:
        if cid in self.absent:
            return None
        open_s = 7.0 * cid
        while open_s + self.open_s <= time_s:
            open_s += PERIOD_S
        return open_s, open_s + self.open_s

    def fit_s(self, cid: int, work: Work) -> float:
        return work.steps * self.pace.get(cid, 1.0)

    def download_s(self, cid: int, nbytes: int, time_s: float, sharing: int) -> float:
        return sharing * nbytes / 1e4

    def upload_s(self, cid: int, nbytes: int, time_s: float, sharing: int) -> float:
        return sharing * nbytes / 2e3

    def cell(self, cid: int) -> int | None:
        return self.cells.get(cid)

    def drops_after_s(self, cid: int, job: int, busy_s: float) -> float:
        return self.leaves.get(cid, math.inf)

    def energy_j(self, cid: int, train_s: float, download_s: float, upload_s: float) -> float:
        return 5.0 * train_s + download_s + 2.0 * upload_s


@dataclass
class CountingEngine(FakeEngine):
    """Remembers whose fits were asked for together."""

    calls: list[list[tuple[int, str]]] = field(default_factory=list)

    def train(
        self, requests: Sequence[FitRequest], progress: Progress | None = None
    ) -> list[FitResult]:
        self.calls.append([(request.job.cid, request.tag) for request in requests])
        return super().train(requests, progress)


def loop_of(
    fed: Federation,
    cohort_size: int = len(NUM_SAMPLES),
    world: World | None = None,
    queue: EventQueue | None = None,
    schedule: Schedule | None = None,
    **options: Any,
) -> Loop:
    """Return the loop over this federation's server and client, with the same seed and plan."""
    training = TrainingConfig(local_steps=fed.steps, learning_rate=fed.learning_rate)
    return Loop(
        server=fed.server,
        client=fed.client,
        world=world or Ideal(),
        executor=InlineExecutor(fed.engine, fed.client),
        plan=Plan(training, rounds=10),
        population=Population(list(NUM_SAMPLES.values())),
        seed=fed.seed,
        schedule=schedule or Sync(cohort_size=cohort_size),
        store=fed.store,
        queue=EventQueue() if queue is None else queue,
        **{"at_window_close": "pause", "selection": "any", **options},
    )


def build(setup: Setup, **options: Any) -> Federation:
    """Return a federation whose engine counts."""
    return setup.start(engine=CountingEngine(), **options)


def fate(loop: Loop) -> dict[str, Any]:
    """Return everything that two equal runs must have in common, tensors as digests."""
    server, store = loop.server, loop.store
    view = server.view()
    return {
        "version": server.version,
        "adapter": view.adapter.digest(),
        "base": {
            m: (p.b.numpy().tobytes(), p.a.numpy().tobytes())
            for m, p in view.base.as_products().items()
        },
        "kept": {
            cid: {n: t.numpy().tobytes() for n, t in store.get(cid).items()}
            for cid in store.clients()
        },
        "contacts": dict(server.contacts),
        "changed": dict(server.changed),
    }


def told(rounds: Sequence[Round]) -> list[Any]:
    """Return what rounds tell of themselves that the seed decides."""
    return [(r.number, r.time_s, list(r.ledger), list(r.events)) for r in rounds]
