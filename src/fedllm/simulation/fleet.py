"""Dispatched clients in virtual time: what each does next, and what may come between."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from fedllm.federation import BaseClient, BaseServer, ClientId, Job, MemoryStore, Plan
from fedllm.federation.transport import Transport
from fedllm.seeding import Numbered
from fedllm.simulation.events import (
    DROPOUT,
    TRAINING_DONE,
    UPLOAD_DONE,
    WINDOW_CLOSE,
    WINDOW_OPEN,
    ClientState,
    EventKind,
    EventQueue,
)
from fedllm.simulation.flights import Awaited, Flight, fitting_job
from fedllm.simulation.population import Population
from fedllm.simulation.record import Diary
from fedllm.simulation.selection import Chosen
from fedllm.system import World

AtWindowClose = Literal["discard", "partial", "pause"]
_NAMES = {kind: kind.name for kind in EventKind}
_TRAINING = ClientState.TRAINING
_IDLE, _AVAILABLE, _WORKING, _UPLOADING = (state.value for state in ClientState)
Transfer = Callable[[ClientId, int, float, int], float]


@dataclass
class Fleet:
    """The clients that were chosen: those who are waited for, and those at work.

    Every one of them has exactly one pending event: its window opening, or the first of being done
    with what it does, leaving, and its window closing.
    """

    server: BaseServer
    client: BaseClient
    world: World
    plan: Plan
    population: Population
    transport: Transport
    seed: int
    at_window_close: AtWindowClose
    queue: EventQueue
    diary: Diary
    store: MemoryStore
    awaited: dict[ClientId, Awaited] = field(default_factory=dict)
    flights: dict[ClientId, Flight] = field(default_factory=dict)
    dispatched: int = 0
    """Clients chosen so far; numbers the jobs."""
    cells: dict[int, list[float]] = field(default_factory=dict)
    """Cell to the ends of the transfers that go on in it."""

    def __post_init__(self) -> None:
        """Remember what many jobs have in common."""
        self._seeds = Numbered(self.seed, "job")
        self._steps = lru_cache(1024)(self.plan.steps)
        self._learning_rate = lru_cache(64)(self.plan.learning_rate)

    def __len__(self) -> int:
        return len(self.awaited) + len(self.flights)

    def __contains__(self, cid: ClientId) -> bool:
        return cid in self.flights or cid in self.awaited

    def counts(self) -> dict[str, int]:
        """Return how many clients do what; all others are idle."""
        counts = {"waiting": len(self.awaited), "training": 0, "uploading": 0, "paused": 0}
        for flight in list(self.flights.values()):  # another thread may ask
            counts["paused" if flight.is_paused else flight.phase.value] += 1
        return counts

    def call(self, chosen: Sequence[Chosen], group: int, latest_s: float) -> list[Flight]:
        """Send for clients: who is inside a window gets a job at once, the others are waited for.

        Args:
            chosen: Who, and when they come.
            group: That they are sent for.
            latest_s: Virtual time after which an arrival is of no use.
        """
        now, flights = self.queue.now_s, list[Flight]()
        there = [cid for cid, (open_s, _) in chosen if open_s <= now]
        jobs = iter(self.server.local_run(there))
        for number, (cid, (open_s, close_s)) in enumerate(chosen, self.dispatched + 1):
            if open_s <= now:
                flights.append(self._take_off(next(jobs), number, group, close_s, latest_s))
            else:
                self.awaited[cid] = Awaited(number, group, close_s)
                self.queue.push(open_s, WINDOW_OPEN, cid, number)
        self.dispatched += len(chosen)
        return flights

    def come(self, cid: ClientId, latest_s: float) -> Flight:
        """Give a client that was waited for its job, now that its window has opened."""
        own, job = self.awaited.pop(cid), next(iter(self.server.local_run([cid])))
        return self._take_off(job, own.number, own.group, own.close_s, latest_s)

    def _take_off(self, job: Job, number: int, group: int, close_s: float, due_s: float) -> Flight:
        """Let a client begin that is there: work out how long everything takes."""
        now, cid, world, wire = self.queue.now_s, job.cid, self.world, self.transport
        self.diary.come(now, self.server.version, cid, number, _AVAILABLE, close_s)
        job, cell, contacts = self._complete(job), world.cell(cid), self.server.contacts
        known_before, contacts[cid] = contacts.get(cid), self.server.version
        down_bytes, up_bytes = wire.down_nbytes(job.payload), wire.up_nbytes(self.client, job)
        if cell is None:
            download_s = world.download_s(cid, down_bytes, now, 1)
        else:
            download_s = self._shared(cell, world.download_s, cid, down_bytes)
        if self.at_window_close == "partial" and close_s < math.inf:
            job = self._shortened(job, now + download_s, up_bytes, close_s)
        train_s = self._fit_s(job)
        work_s = download_s + train_s
        upload_s = world.upload_s(cid, up_bytes, now + work_s, 1)
        busy_s, arrives_s = work_s + upload_s, now + work_s + upload_s
        leaves_after_s = world.drops_after_s(cid, number, busy_s)
        self.flights[cid] = flight = Flight(
            job,
            number,
            group,
            now,
            now,
            close_s,
            download_s,
            train_s,
            work_s,
            down_bytes,
            up_bytes,
            known_before,
            upload_s,
            leaves_after_s,
            arrives_s,
            cell,
        )
        is_cut = arrives_s > close_s and self.at_window_close != "pause"
        flight.is_doomed = is_cut or arrives_s > due_s or busy_s > leaves_after_s
        self._push_next(flight, TRAINING_DONE)
        return flight

    def resume(self, flight: Flight) -> None:
        """Let a client that was paused go on."""
        now, cid, is_training = self.queue.now_s, flight.job.cid, flight.phase is _TRAINING
        window = self.world.window(cid, now)
        flight.resume(now, math.inf if window is None else window[1])
        state = _WORKING if is_training else _UPLOADING
        self.diary.come(now, self.server.version, cid, flight.number, state, flight.close_s)
        self._push_next(flight, TRAINING_DONE if is_training else UPLOAD_DONE)

    def _shortened(self, job: Job, begin_s: float, up_bytes: int, close_s: float) -> Job:
        """Return a job with as many steps as can be done and sent before a window closes."""

        def is_in_time(steps: int) -> bool:
            trained = begin_s + self._fit_s(replace(job, steps=steps))
            return trained + self.world.upload_s(job.cid, up_bytes, trained, 1) <= close_s

        return fitting_job(job, is_in_time)

    def begin_upload(self, flight: Flight) -> None:
        """Let a client that has trained send its update."""
        now, cid = self.queue.now_s, flight.job.cid
        if flight.cell is not None:
            upload_s = self.world.upload_s
            flight.upload_s = self._shared(flight.cell, upload_s, cid, flight.up_bytes)
        elif flight.done_s:  # it was paused; else it is as was expected
            flight.upload_s = self.world.upload_s(cid, flight.up_bytes, now, 1)
        flight.begin_upload(now)
        self.diary.note(now, "TRAINING_DONE", self.server.version, cid, flight.number, _UPLOADING)
        kind = self._push_next(flight, UPLOAD_DONE)
        if kind is not UPLOAD_DONE and (kind is DROPOUT or self.at_window_close != "pause"):
            flight.is_doomed = True

    def land(self, flight: Flight) -> None:
        """Take in a client that is done."""
        now, cid = self.queue.now_s, flight.job.cid
        self.diary.note(now, "UPLOAD_DONE", self.server.version, cid, flight.number, _IDLE)
        del self.flights[cid]

    def pauses(self, kind: EventKind, flight: Flight) -> bool:
        """Pause a client whose window closes, if it is to go on in its next one; tell so."""
        if kind is not WINDOW_CLOSE or self.at_window_close != "pause":
            return False
        now, cid = self.queue.now_s, flight.job.cid
        window = self.world.window(cid, now)
        if window is None:
            return False
        flight.pause(now)
        self.diary.note(now, "WINDOW_CLOSE", self.server.version, cid, flight.number, _IDLE)
        self.queue.push(max(window[0], now), WINDOW_OPEN, cid, flight.number)
        return True

    def lose(self, flight: Flight, outcome: str, kind: EventKind | None = None) -> None:
        """Take a client out whose job comes to nothing.

        What it has trained is gone; what it has received, it holds.

        Args:
            flight: The client.
            outcome: Why, as the ledger tells it.
            kind: What it is lost by; none if the server needs it no more.
        """
        now, version = self.queue.now_s, self.server.version
        del self.flights[flight.cid]
        name = "CANCELLED" if kind is None else _NAMES[kind]
        self.diary.leave(now, name, version, flight.cid, flight.number, _IDLE, outcome)
        if flight.worked_s(now) < flight.download_s:
            if flight.known_before is None:
                self.server.contacts.pop(flight.cid, None)
            else:
                self.server.contacts[flight.cid] = flight.known_before
        self.diary.ledger.append(flight.row(now, self.world, version, outcome))

    def pace_s(self, cid: ClientId) -> float:
        """Return about how long a client takes for a job, for comparing clients."""
        job = self._complete(next(iter(self.server.local_run([cid]))), is_sent=False)
        nbytes = job.payload.adapter.nbytes
        moved = self.world.download_s(cid, nbytes, 0.0, 1) + self.world.upload_s(
            cid, nbytes, 0.0, 1
        )
        return self._fit_s(job) + moved

    def _complete(self, job: Job, *, is_sent: bool = True) -> Job:
        """Fill in what the algorithm does not decide: seed, steps, learning rate, private state."""
        cid, payload = job.cid, job.payload
        version = payload.version
        rows, steps_of = self.population.sizes[cid], self._steps
        return job.filled(
            payload=self.transport.send_down(payload, self.server) if is_sent else payload,
            seed=self._seeds.of(cid, version),
            steps=steps_of(rows),
            learning_rate=self._learning_rate(version),
            num_samples=rows,
            state=self.store.get(cid),
        )

    def _fit_s(self, job: Job) -> float:
        rank = self.server.ranks.of(job.cid)
        work = self.population.work(job, self.client, self.plan, rank)
        return self.world.fit_s(job.cid, work)

    def _shared(self, cell: int, seconds_of: Transfer, cid: ClientId, nbytes: int) -> float:
        """Begin a transfer, with the share of its cell that there now is."""
        now = self.queue.now_s
        going = [end_s for end_s in self.cells.get(cell, ()) if end_s > now]
        seconds = seconds_of(cid, nbytes, now, len(going) + 1)
        self.cells[cell] = [*going, now + seconds]
        return seconds

    def _push_next(self, flight: Flight, kind: EventKind) -> EventKind:
        """Add the next event of a client at work, and return its kind.

        Args:
            flight: The client.
            kind: What happens at the end of its phase, if nothing comes between.
        """
        since_s = flight.since_s
        at_s = since_s + flight.left_s
        leaves_s = since_s + (flight.leaves_after_s - flight.done_s)
        if leaves_s < at_s:
            kind, at_s = DROPOUT, leaves_s
        if flight.close_s < at_s:
            kind, at_s = WINDOW_CLOSE, flight.close_s
        self.queue.push(at_s, kind, flight.job.cid, flight.number)
        return kind
