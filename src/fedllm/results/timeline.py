"""What clients did in virtual time, read from a run's events and ledger."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fedllm.config import read
from fedllm.results.run_dir import CONFIG_FILE, RunDir
from fedllm.results.spans import mean_count, merged, middles

USED = "arrived"
"""Outcome of a job whose update was taken."""
OUTCOMES: Mapping[str, str] = {
    "arrived": "its update was taken",
    "rejected": "its update was refused by a check",
    "stale": "its update was too late by versions",
    "window": "its client's window closed",
    "dropout": "its client left",
    "deadline": "the round's deadline passed",
    "surplus": "others were faster",
    "unfinished": "the run ended",
}
UNDER_WAY = "under way"
"""Instead of an outcome, of a job that goes on."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one job without interruption."""

    client: int
    job: int
    start_s: float
    end_s: float
    phase: str
    """`training` (download included) or `uploading`."""
    outcome: str
    staleness: int | None


@dataclass(frozen=True)
class Excerpt:
    """As much of a timeline as one picture can show."""

    clients: Sequence[int]
    """The busiest, in ascending order."""
    segments: Sequence[Segment]
    windows: Mapping[int, Sequence[tuple[float, float]]]
    lost: Sequence[Mapping[str, Any]]
    """Lines of the ledger: jobs of these clients that came to nothing."""
    until_s: float
    """Virtual time up to which everything is shown."""
    told: str
    """Which clients, and up to when, if that is not all."""


@dataclass(frozen=True)
class Participation:
    """How much each client that was sent for did, the one with the most used updates first."""

    clients: Sequence[int]
    jobs: Sequence[int]
    used: Sequence[int]
    """Of the jobs, those whose update was taken."""
    num_clients: int
    """Those included that were never sent for."""

    @property
    def never_seen(self) -> int:
        """How many clients were never sent for."""
        return self.num_clients - len(self.clients)

    @property
    def never_used(self) -> int:
        """How many clients gave no update that was used: those never seen, and others."""
        return self.num_clients - sum(count > 0 for count in self.used)

    @property
    def gini(self) -> float:
        """How unevenly used updates are spread over all clients."""
        return gini([*self.used, *[0] * self.never_seen])

    @property
    def told(self) -> str:
        """What a reader should know first."""
        return (
            f"{self.never_seen} of {self.num_clients} clients never seen,"
            f" {self.never_used} never used, Gini {self.gini:.2f}"
        )


@dataclass(frozen=True)
class Timeline:
    """The jobs of a run; older runs and prototype mode have all of it at time 0."""

    events: Sequence[Mapping[str, Any]]
    ledger: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, run: RunDir) -> Timeline:
        """Read a run's."""
        ledger = [row for row in run.read("ledger") if "outcome" in row]
        return cls(run.read("events"), ledger)

    @cached_property
    def end_s(self) -> float:
        """The last virtual time that is told of."""
        return max((float(event["time_s"]) for event in self.events), default=0.0)

    @property
    def has_time(self) -> bool:
        """Whether virtual time has passed."""
        return bool(self.ledger) and self.end_s > 0.0

    @cached_property
    def outcomes(self) -> dict[str, int]:
        """How many jobs ended in which way, the most frequent first."""
        return dict(Counter(row["outcome"] for row in self.ledger).most_common())

    @cached_property
    def staleness(self) -> dict[int, int]:
        """Versions that a used update was late by, to how many were."""
        late = (row["staleness"] for row in self.ledger if row["outcome"] == USED)
        return dict(sorted(Counter(value for value in late if value is not None).items()))

    @cached_property
    def aggregations_s(self) -> list[float]:
        """When the server made a version."""
        return [e["time_s"] for e in self.events if e["event"] == "AGGREGATED"]

    def jobs_by_client(self) -> dict[int, tuple[int, int]]:
        """Return client to how many jobs it had, and how many of them were used."""
        found: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for row in self.ledger:
            found[row["client"]][0] += 1
            found[row["client"]][1] += row["outcome"] == USED
        return {client: (jobs, used) for client, (jobs, used) in sorted(found.items())}

    def participation(self, num_clients: int) -> Participation:
        """Return who contributed; clients beyond the number given count all the same."""
        jobs = self.jobs_by_client()
        order = sorted(jobs, key=lambda client: (-jobs[client][1], -jobs[client][0], client))
        counts, used = ([jobs[client][place] for client in order] for place in (0, 1))
        return Participation(order, counts, used, max(num_clients, len(order)))

    def busiest(self, count: int) -> list[int]:
        """Return the clients with the most jobs, in ascending order."""
        jobs = self.jobs_by_client()
        chosen = sorted(jobs, key=lambda client: (-jobs[client][0], client))[:count]
        return sorted(chosen)

    def windows(self, clients: Iterable[int] | None = None) -> dict[int, list[tuple[float, float]]]:
        """Return when some clients, or all, are known to be there, up to the end of the run.

        A window is known from the moment its client was sent for in it.
        """
        wanted, found = None if clients is None else set(clients), defaultdict(list)
        for event in self.events:
            if event["event"] == "WINDOW_OPEN" and (wanted is None or event["client"] in wanted):
                until = event.get("until_s")
                end = self.end_s if until is None else min(until, self.end_s)
                found[event["client"]].append((event["time_s"], end))
        return {client: merged(own) for client, own in found.items()}

    def segments(self, clients: Iterable[int] | None = None) -> list[Segment]:
        """Return what some clients did, or all, stretch by stretch, in order of their ends."""
        if clients is None:
            return self._segments
        wanted = set(clients)
        return [segment for segment in self._segments if segment.client in wanted]

    @cached_property
    def _segments(self) -> list[Segment]:
        ends = {row["job"]: (row["outcome"], row["staleness"]) for row in self.ledger}
        running: dict[int, tuple[int, float, str]] = {}
        found = []

        def stop(job: int, time_s: float) -> None:
            client, since, phase = running.pop(job)
            outcome, late = ends.get(job, (UNDER_WAY, None))
            if time_s > since:
                found.append(Segment(client, job, since, time_s, phase, outcome, late))

        for event in self.events:
            job = event.get("job")
            if job is None:
                continue
            if job in running:
                stop(job, event["time_s"])
            if event["state"] in ("available", "training", "uploading"):
                phase = "uploading" if event["state"] == "uploading" else "training"
                running[job] = event["client"], event["time_s"], phase
        for job in list(running):
            stop(job, self.end_s)
        return found

    def excerpt(self, max_clients: int, max_segments: int) -> Excerpt:
        """Return what one picture can show: the busiest clients, from the beginning.

        Args:
            max_clients: Of more, those with the most jobs.
            max_segments: Of more, the first; then nothing after them is shown.
        """
        clients, everyone = self.busiest(max_clients), len(self.jobs_by_client())
        segments = sorted(self.segments(clients), key=lambda segment: segment.start_s)
        until_s = self.end_s
        if len(segments) > max_segments:
            until_s = segments[max_segments].start_s
            segments = [_cut(s, until_s) for s in segments[:max_segments] if s.start_s < until_s]
        windows = {
            client: [(low, min(high, until_s)) for low, high in own if low < until_s]
            for client, own in self.windows(clients).items()
        }
        wanted = set(clients)
        lost = [
            row
            for row in self.ledger
            if row["outcome"] != USED and row["client"] in wanted and row["ended_s"] <= until_s
        ]
        told = f"the {len(clients)} busiest of " if everyone > len(clients) else ""
        told += "1 client" if everyone == 1 else f"{everyone} clients"
        if until_s < self.end_s:
            told += f", the first {until_s / self.end_s:.0%} of the time"
        return Excerpt(clients, segments, windows, lost[:max_segments], until_s, told)

    def seconds_by_outcome(self) -> dict[str, float]:
        """Return the client-seconds of work that ended in each way."""
        found: dict[str, float] = defaultdict(float)
        for row in self.ledger:
            found[row["outcome"]] += row["download_s"] + row["train_s"] + row["upload_s"]
        return dict(found)

    def joules_by_outcome(self) -> dict[str, float]:
        """Return the joules that went into jobs that ended in each way."""
        found: dict[str, float] = defaultdict(float)
        for row in self.ledger:
            found[row["outcome"]] += row.get("energy_j", 0.0)
        return dict(found)

    def at_work(self, steps: int) -> tuple[list[float], list[float], list[float]]:
        """Return times, and how many clients train and how many send around each, on average."""
        counts = []
        for phase in ("training", "uploading"):
            spans = [(s.start_s, s.end_s) for s in self.segments() if s.phase == phase]
            counts.append(mean_count(spans, self.end_s, steps))
        return middles(self.end_s, steps), counts[0], counts[1]

    def online(self, steps: int) -> list[float]:
        """Return how many clients are known to be there around each time; see `windows`."""
        spans = [span for own in self.windows().values() for span in own]
        return mean_count(spans, self.end_s, steps)

    def working_share(self) -> float:
        """Return the share of the time for which clients are known to be there that they work."""
        online = sum(high - low for own in self.windows().values() for low, high in own)
        worked = sum(segment.end_s - segment.start_s for segment in self.segments())
        return min(worked / online, 1.0) if online else 0.0


def _cut(segment: Segment, until_s: float) -> Segment:
    return replace(segment, end_s=min(segment.end_s, until_s))


def num_clients_of(run: RunDir) -> int:
    """Return how many clients a run's configuration speaks of; 0 if it does not say."""
    federation = read(run.path / CONFIG_FILE).get("federation")
    return int(federation.get("num_clients", 0)) if isinstance(federation, Mapping) else 0


def gini(values: Sequence[float]) -> float:
    """Return how unevenly something is spread: 0 evenly, near 1 all with one.

    >>> gini([1, 1, 1, 1]), gini([0, 0, 0, 4])
    (0.0, 0.75)
    """
    total, count = sum(values), len(values)
    if not total:
        return 0.0
    ranked = sorted(values)
    weighted = sum((2 * place - count + 1) * value for place, value in enumerate(ranked))
    return weighted / (count * total)
