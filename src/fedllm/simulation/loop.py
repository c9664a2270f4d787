"""The one loop: events in virtual time, for every mode, schedule and algorithm.

Prototype mode is this loop in the `Ideal` world. Virtual time is decided before anything is
computed; jobs run when the first of their results is needed, all whose inputs are known together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedllm.federation import (
    BaseClient,
    BaseServer,
    ClientId,
    Executor,
    Job,
    MemoryStore,
    Part,
    Plan,
)
from fedllm.federation.fidelity import aggregation_error
from fedllm.federation.staleness import fresh_parts, is_mean
from fedllm.simulation import events, snapshot
from fedllm.simulation.events import NOBODY, EventKind, EventQueue
from fedllm.simulation.fleet import AtWindowClose, Fleet
from fedllm.simulation.flights import Flight
from fedllm.simulation.lazy import Computation
from fedllm.simulation.population import Population
from fedllm.simulation.reception import Reception
from fedllm.simulation.record import Diary, Round
from fedllm.simulation.recruiting import Recruiter
from fedllm.simulation.schedules import Group, Schedule, Sync
from fedllm.simulation.selection import Selection
from fedllm.system import World

MOST_LOSSES = 1000
"""So many jobs lost one after another, with no update between, end a run."""
_LOST_BY = {events.DROPOUT: "dropout", events.WINDOW_CLOSE: "window"}


@dataclass
class Loop:
    """Drives a federation through virtual time.

    Cost of an aggregation: that of the jobs that ended since the one before, whatever the
    population. Memory: pending events, jobs and private state of dispatched clients.
    """

    server: BaseServer
    client: BaseClient
    world: World
    executor: Executor
    plan: Plan
    population: Population
    seed: int
    schedule: Schedule = field(default_factory=Sync)
    store: MemoryStore = field(default_factory=MemoryStore)
    reception: Reception = field(default_factory=Reception)
    queue: EventQueue = field(default_factory=EventQueue)
    selection: Literal["available", "any"] = "available"
    at_window_close: AtWindowClose = "discard"
    time_limit_s: float = math.inf
    compute: Literal["lazy", "eager"] = "lazy"
    lost: Literal["skip", "compute"] = "skip"

    def __post_init__(self) -> None:
        """Make the parts that the loop drives."""
        self.diary = Diary()
        self.fleet = Fleet(
            server=self.server,
            client=self.client,
            world=self.world,
            plan=self.plan,
            population=self.population,
            transport=self.reception.transport,
            seed=self.seed,
            at_window_close=self.at_window_close,
            queue=self.queue,
            diary=self.diary,
            store=self.store,
        )
        self.computation = Computation(self.executor, self.compute, self.lost)
        self.answered: dict[ClientId, Job] = {}
        """Jobs whose updates wait for their aggregation."""
        self.deadlines: dict[int, tuple[int, float]] = {}
        """Group to the number and the virtual time of its deadline."""
        self.losses = 0
        """Jobs lost since the last arrival."""
        self.ended = ""
        """Why the run has ended before its last round."""
        self._rounds = 0
        self.is_stirred = True
        """Whether something has happened that the schedule may act on."""
        selection = Selection(self.world, self.population.pool(), self.selection, self.seed)
        self.recruiter = Recruiter(self.server, self.schedule, self.fleet, selection)

    def run(self, rounds: int) -> Iterator[Round]:
        """Advance to this many server updates, yielding after each.

        Where nobody will come any more, nothing arrives any more, or time is up, the run ends
        before, with an empty round that says why.
        """
        self._rounds = rounds
        while self.server.version < rounds and not self.ended:
            ready = self.schedule.ready
            if ready is not None:
                yield self._aggregate(ready, is_last=self.server.version + 1 == rounds)
                continue
            self.is_stirred = False
            self.ended = self._go_on()
            if self.ended:
                yield self._aggregate(None, is_last=True)

    def _go_on(self) -> str:
        """Send for clients and let things happen; say why the run ends, if it does."""
        if self.losses >= MOST_LOSSES:
            return f"{self.losses} jobs in a row were lost and nothing arrived"
        self._fill()
        if not self.queue:
            return "no client that could be chosen will ever be available again"
        return self._advance()

    def _advance(self) -> str:
        """Let things happen until the server may act; say why the run ends, if it does."""
        pending, pop, limit_s = self.queue.pending, self.queue.pop, self.time_limit_s
        fleet, flights = self.fleet, self.fleet.flights
        while pending and not self.is_stirred:
            if pending[0][0] > limit_s:
                self.queue.now_s = limit_s
                return f"the time limit of {limit_s:g} s is reached"
            time_s, kind, _, cid, number = pop()
            flight = flights.get(cid)
            if flight is None or flight.number != number:
                self._begin_or_end(kind, cid, number)
            elif kind is events.TRAINING_DONE:
                fleet.begin_upload(flight)
            elif kind is events.UPLOAD_DONE:
                self._arrive(flight, time_s)
            elif kind is events.WINDOW_OPEN:
                fleet.resume(flight)
            elif not fleet.pauses(kind, flight):
                self._lose(flight, _LOST_BY[kind], kind)
        return ""

    def state(self) -> dict[str, object]:
        """Return all that a checkpoint needs (see `restore`)."""
        return snapshot.taken(self)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that another loop of the same configuration returned."""
        snapshot.put_back(self, state)

    # who is sent for

    def _fill(self) -> None:
        """Send for the clients that the schedule wants now."""
        if self.schedule.is_stream and not self.schedule.groups:
            self._begin(0)
        for order in self.schedule.orders(len(self.fleet)):
            chosen = self.recruiter.recruit(order, self.queue.now_s)
            if chosen and not self.schedule.is_stream:
                self._begin(order.group, [cid for cid, _ in chosen])
            latest_s = self._latest_s(order.group)
            self.computation.begin(self.fleet.call(chosen, order.group, latest_s))

    def _latest_s(self, group: int) -> float:
        """Return the virtual time after which a group needs no arrival of those called now."""
        is_limited = self.deadlines and not self.schedule.is_stream
        return self.deadlines[group][1] if is_limited else math.inf

    def _begin(self, group: int, asked: Sequence[ClientId] = ()) -> None:
        """Open a group, and set its deadline."""
        self.schedule.begin(group, asked)
        if self.schedule.deadline_s is not None:
            self.fleet.dispatched += 1
            number, due_s = self.fleet.dispatched, self.queue.now_s + self.schedule.deadline_s
            self.deadlines[group] = number, due_s
            self.queue.push(due_s, events.DEADLINE, NOBODY, number)

    # what happens

    def _begin_or_end(self, kind: EventKind, cid: ClientId, number: int) -> None:
        """Handle an event that is no flight's: a client comes, time is up, or it is void."""
        if kind is events.WINDOW_OPEN:
            awaited = self.fleet.awaited.get(cid)
            if awaited is not None and awaited.number == number:
                self.computation.begin([self.fleet.come(cid, self._latest_s(awaited.group))])
        elif kind is events.DEADLINE:
            self._deadline(number)

    def _deadline(self, due: int) -> None:
        """Let a group wait no longer."""
        for group, (number, _) in self.deadlines.items():
            if number == due:
                self.diary.note(self.queue.now_s, "DEADLINE", self.server.version)
                self.schedule.groups[group].is_due = self.is_stirred = True

    def _arrive(self, flight: Flight, now_s: float) -> None:
        """Take in an update that has arrived, if it can be used."""
        job, version, results = flight.job, self.server.version, self.computation.results
        cid, lateness = job.cid, version - job.payload.version
        self.fleet.land(flight)
        if lateness and self.schedule.is_stale(lateness):
            self.computation.drop(flight)
            self._miss(flight, lateness, "stale")
            return
        if cid not in results:
            room = self.schedule.room(flight.group, self._rounds - version)
            self.computation.compute_with(flight, self.fleet.flights.values(), room)
        made = results.pop(cid)
        update, flight.up_bytes, reason = self.reception.receive(made, job, self.client)
        if reason:
            # what the client keeps stays as it was: what it trained is not to be trusted
            self.diary.reject(cid, reason)
            self._miss(flight, lateness, "rejected")
            return
        self.losses = 0
        self.store.put(cid, update.state)
        self.answered[cid] = job
        self.is_stirred = self.schedule.receive(flight.group, update)
        self.diary.ledger.append(flight.row(now_s, self.world, version, "arrived", lateness))

    def _miss(self, flight: Flight, lateness: int, outcome: str) -> None:
        """Write down an update that has arrived for nothing."""
        self.is_stirred = True
        self.losses += 1
        self.schedule.miss(flight.group)
        now_s, version = self.queue.now_s, self.server.version
        self.diary.ledger.append(flight.row(now_s, self.world, version, outcome, lateness))

    def _lose(self, flight: Flight, outcome: str, kind: EventKind | None = None) -> None:
        """Give up a job."""
        self.is_stirred = True
        self.losses += 1
        self.computation.drop(flight)
        self.fleet.lose(flight, outcome, kind)
        self.schedule.miss(flight.group)

    def _dismiss(self, outcome: str, group: int | None = None) -> None:
        """Send clients home whose updates are of no use any more: a group's, or all."""
        fleet, losses = self.fleet, self.losses
        for cid in [cid for cid, own in fleet.awaited.items() if group in (None, own.group)]:
            del fleet.awaited[cid]
        for flight in sorted(fleet.flights.values(), key=lambda flight: flight.cid):
            if group in (None, flight.group):
                self._lose(flight, outcome)
        self.losses = losses

    # what is made of it

    def _aggregate(self, group: int | None, *, is_last: bool) -> Round:
        """Make the next version of a group's updates, of which there may be none."""
        schedule, version, now = self.schedule, self.server.version, self.queue.now_s
        own = Group() if group is None else schedule.groups[group]
        sent = [] if group is None else schedule.parts(group, self.server)
        if group is not None and not schedule.is_stream:
            self._dismiss("deadline" if own.is_due else "surplus", group)
        if is_last:
            self._dismiss("unfinished")
        has_ideal = self.server.has_mean and is_mean(self.server, sent)
        begin = time.perf_counter()
        self.server.apply(self._parts(own, sent))
        middle = time.perf_counter()
        agg_error = aggregation_error(self.server, sent, self.answered) if has_ideal else None
        for update in own.arrived:
            del self.answered[update.cid]
        if group is not None:
            schedule.close(group)
            self.deadlines.pop(group, None)
        self.diary.note(now, "AGGREGATED", version)
        wall_s = {
            "train": self.computation.spent_s(),
            "aggregate": middle - begin,
            "agg_error": time.perf_counter() - middle,
        }
        return self.diary.closed(
            number=version + 1,
            time_s=now,
            updates=[update for _, update in sent],
            agg_error=agg_error,
            wall_s=wall_s,
            staleness=[version - update.version for _, update in sent],
            in_flight=len(self.fleet.flights),
            is_last=is_last,
            ended=self.ended,
        )

    def _parts(self, own: Group, sent: Sequence[Part]) -> Sequence[Part]:
        """Return what the algorithm aggregates: checked, made private, in today's coordinates."""
        rejected, asked = self.diary.rejected, len(own.asked) or len(sent)
        if not sent and (not rejected or len(rejected) < asked):
            return ()
        jobs = {update.cid: self.answered[update.cid] for _, update in sent}
        parts = self.reception.parts(sent, jobs, rejected, asked)
        return fresh_parts(self.server, parts, jobs, is_change=self.schedule.takes_changes)
