"""The one loop: events in virtual time, for every mode and every algorithm.

Prototype mode is this loop in the `Ideal` world. Virtual time is decided before anything is
computed, so the jobs of a cohort run together, when the first of their results is needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedllm.errors import RunError
from fedllm.federation import (
    BaseClient,
    BaseServer,
    ClientId,
    Executor,
    Job,
    MemoryStore,
    Plan,
    Update,
    restore_server,
    server_state,
)
from fedllm.federation.fidelity import aggregation_error
from fedllm.seeding import derive, rng
from fedllm.simulation.events import ClientState, Event, EventKind, EventQueue
from fedllm.simulation.reception import Reception
from fedllm.simulation.schedules import Sync
from fedllm.system import World


@dataclass(frozen=True)
class Round:
    """What one server update was made of."""

    number: int
    """The version it made, from 1."""
    time_s: float
    """Virtual time at which it was made."""
    updates: Sequence[Update]
    """Those that were aggregated, by client."""
    rejected: Sequence[Mapping[str, Any]]
    """Client and reason of each update that was not."""
    agg_error: float | None
    """Distance of the aggregate from the ideal mean update; see `federation.fidelity`."""
    ledger: Sequence[Mapping[str, int]]
    """Bytes down and up of each client."""
    events: Sequence[Mapping[str, Any]]
    """What happened, in order."""
    wall_s: Mapping[str, float]
    """Real seconds of local training and of aggregation; not reproducible."""


@dataclass
class Population:
    """Who there is: the number of training rows of each client, in one array."""

    sizes: Sequence[int]

    def pool(self) -> Sequence[ClientId]:
        """Return the clients that have something to learn from."""
        if all(size > 0 for size in self.sizes):
            return range(len(self.sizes))
        return [cid for cid, size in enumerate(self.sizes) if size > 0]


@dataclass
class Loop:
    """Drives a federation through virtual time.

    Cost of a round: its cohort's, whatever the population. Memory: pending events, jobs and private
    state of dispatched clients.
    """

    server: BaseServer
    client: BaseClient
    world: World
    executor: Executor
    plan: Plan
    population: Population
    cohort_size: int
    seed: int
    store: MemoryStore = field(default_factory=MemoryStore)
    reception: Reception = field(default_factory=Reception)
    schedule: Sync = field(default_factory=Sync)
    queue: EventQueue = field(default_factory=EventQueue)
    states: dict[ClientId, ClientState] = field(default_factory=dict)
    """Of clients that are not idle."""
    jobs: dict[ClientId, Job] = field(default_factory=dict)
    """Dispatched and not yet arrived."""
    results: dict[ClientId, Update] = field(default_factory=dict)
    """Computed and not yet arrived."""
    answered: dict[ClientId, Job] = field(default_factory=dict)
    """Jobs of this round whose updates have arrived."""

    def __post_init__(self) -> None:
        self._pool = self.population.pool()
        self._events: list[dict[str, Any]] = []
        self._ledger: list[dict[str, int]] = []
        self._rejected: list[dict[str, Any]] = []
        self._fit_s = 0.0

    def run(self, rounds: int) -> Iterator[Round]:
        """Advance to this many server updates, yielding after each.

        Raises:
            RunError: If no event is left and the cohort is not complete.
        """
        while self.server.version < rounds:
            if not self.schedule.cohort:
                self._begin()
            if not len(self.queue):
                missing = sorted(set(self.schedule.cohort) - set(self.answered))
                raise RunError(
                    f"round {self.server.version + 1} cannot end: clients {missing} of its cohort"
                    " will never be available"
                )
            self._handle(self.queue.pop())
            if self.schedule.is_ready:
                yield self._aggregate()

    def state(self) -> dict[str, object]:
        """Return all that a checkpoint needs (see `restore`)."""
        return {
            "server": server_state(self.server),
            "clock_s": self.queue.now_s,
            "pending": self.queue.snapshot(),
            "cohort": self.schedule.cohort,
            "arrived": self.schedule.arrived,
            "states": self.states,
            "jobs": self.jobs,
            "results": self.results,
            "answered": self.answered,
            "rejected": self._rejected,
            "kept": {cid: self.store.get(cid) for cid in self.store.clients()},
            "events": self._events,
            "ledger": self._ledger,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that another loop of the same configuration returned."""
        restore_server(self.server, state["server"])
        self.queue = EventQueue(state["clock_s"], iter(state["pending"]))
        self._rejected, self.answered = list(state["rejected"]), dict(state["answered"])
        lost = len(self._rejected)
        self.schedule = Sync(list(state["cohort"]), list(state["arrived"]), lost)
        self.states = dict(state["states"])
        self.jobs, self.results = dict(state["jobs"]), dict(state["results"])
        self.store = MemoryStore(state["kept"])
        self._events, self._ledger = list(state["events"]), list(state["ledger"])

    def _begin(self) -> None:
        """Sample a cohort and ask when each client is there."""
        version, now = self.server.version, self.queue.now_s
        stream = rng(self.seed, "cohort", version)
        cohort = self.server.sample(self._pool, self.cohort_size, stream)
        self.schedule.begin(cohort)
        for cid in cohort:
            window = self.world.window(cid, now)
            if window is None:
                continue
            open_s, close_s = window
            self.queue.push(Event(max(now, open_s), EventKind.WINDOW_OPEN, cid))
            if math.isfinite(close_s):
                self.queue.push(Event(close_s, EventKind.WINDOW_CLOSE, cid))

    def _handle(self, event: Event) -> None:
        match event.kind:
            case EventKind.WINDOW_OPEN:
                self._dispatch(event)
            case EventKind.TRAINING_DONE:
                self._enter(event, ClientState.UPLOADING)
                nbytes = self.reception.transport.up_nbytes(self.client, self.jobs[event.cid])
                upload_s = self.world.upload_s(event.cid, nbytes)
                self._after(upload_s, EventKind.UPLOAD_DONE, event.cid)
            case EventKind.UPLOAD_DONE:
                self._arrive(event)
            case EventKind.WINDOW_CLOSE:
                self._enter(event, self.states.get(event.cid, ClientState.IDLE))

    def _dispatch(self, event: Event) -> None:
        """Give a client of the cohort its job, and decide when it will be done."""
        self._enter(event, ClientState.AVAILABLE)
        cid = event.cid
        for job in self.server.local_run([cid]):
            self.jobs[cid] = self._complete(job)
        self.server.contacts[cid] = self.server.version
        job = self.jobs[cid]
        down = self.reception.transport.down_nbytes(job.payload)
        self._ledger.append(
            {"round": self.server.version + 1, "client": cid, "down_bytes": down, "up_bytes": 0}
        )
        self.states[cid] = ClientState.TRAINING
        busy_s = self.world.download_s(cid, down) + self.world.fit_s(cid, job.steps)
        self._after(busy_s, EventKind.TRAINING_DONE, cid)

    def _complete(self, job: Job) -> Job:
        """Fill in what the algorithm does not decide: seed, steps, learning rate, private state."""
        rows = int(self.population.sizes[job.cid])
        return replace(
            job,
            payload=self.reception.transport.send_down(job.payload, self.server),
            seed=derive(self.seed, "job", job.cid, job.version),
            steps=self.plan.steps(rows),
            learning_rate=self.plan.learning_rate(job.version),
            num_samples=rows,
            state=self.store.get(job.cid),
        )

    def _arrive(self, event: Event) -> None:
        if event.cid not in self.results:
            self._compute()
        self._enter(event, ClientState.IDLE)
        job = self.answered[event.cid] = self.jobs.pop(event.cid)
        update, nbytes, reason = self.reception.receive(
            self.results.pop(event.cid), job, self.client
        )
        row = next(row for row in reversed(self._ledger) if row["client"] == event.cid)
        row["up_bytes"] = nbytes
        if reason:
            # what the client keeps stays as it was: what it trained is not to be trusted
            self._rejected.append({"client": event.cid, "reason": reason})
            self.schedule.reject()
            return
        self.store.put(event.cid, update.state)
        self.schedule.receive(update)

    def _compute(self) -> None:
        """Run all dispatched jobs whose results are not known yet, together."""
        waiting = [self.jobs[cid] for cid in sorted(self.jobs) if cid not in self.results]
        begin = time.perf_counter()
        for update in self.executor.run(waiting):
            self.results[update.cid] = update
        self._fit_s += time.perf_counter() - begin

    def _aggregate(self) -> Round:
        sent = self.schedule.parts(self.server)
        begin = time.perf_counter()
        # as many as were asked: a stage may ask everyone, and some methods one at a time
        asked = len(self.schedule.cohort)
        parts = self.reception.parts(sent, self.answered, self._rejected, asked)
        self.server.apply(parts)
        middle = time.perf_counter()
        agg_error = aggregation_error(self.server, sent, self.answered)
        wall_s = {
            "train": self._fit_s,
            "aggregate": middle - begin,
            "agg_error": time.perf_counter() - middle,
        }
        made = Round(
            number=self.server.version,
            time_s=self.queue.now_s,
            updates=[part.update for part in sent],
            rejected=sorted(self._rejected, key=lambda row: row["client"]),
            agg_error=agg_error,
            ledger=sorted(self._ledger, key=lambda row: row["client"]),
            events=self._events,
            wall_s=wall_s,
        )
        self._events, self._ledger, self._rejected, self._fit_s = [], [], [], 0.0
        self.answered = {}
        self.schedule.begin([])
        return made

    def _after(self, delay_s: float, kind: EventKind, cid: ClientId) -> None:
        self.queue.push(Event(self.queue.now_s + delay_s, kind, cid))

    def _enter(self, event: Event, state: ClientState) -> None:
        """Record an event and the state it leads to."""
        if state is ClientState.IDLE:
            self.states.pop(event.cid, None)
        else:
            self.states[event.cid] = state
        self._events.append(
            {
                "time_s": event.time_s,
                "event": event.kind.name,
                "client": event.cid,
                "round": self.server.version + 1,
                "state": state.value,
            }
        )
