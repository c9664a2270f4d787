"""What clients did in virtual time, read from a run's events and ledger."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedllm.results.run_dir import RunDir

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


@dataclass(frozen=True)
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
class Timeline:
    """The jobs of a run; older runs and prototype mode have all of it at time 0."""

    events: Sequence[Mapping[str, Any]]
    ledger: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, run: RunDir) -> Timeline:
        """Read a run's."""
        ledger = [row for row in run.read("ledger") if "outcome" in row]
        return cls(run.read("events"), ledger)

    @property
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

    def busiest(self, count: int) -> list[int]:
        """Return the clients with the most jobs, in ascending order."""
        jobs = self.jobs_by_client()
        chosen = sorted(jobs, key=lambda client: (-jobs[client][0], client))[:count]
        return sorted(chosen)

    def windows(self, clients: Iterable[int]) -> dict[int, list[tuple[float, float]]]:
        """Return the windows in which some clients were sent for, cut at the end of the run."""
        wanted, found = set(clients), defaultdict(set)
        for event in self.events:
            if event["event"] == "WINDOW_OPEN" and event["client"] in wanted:
                until = event.get("until_s")
                end = self.end_s if until is None else min(until, self.end_s)
                found[event["client"]].add((event["time_s"], end))
        return {client: sorted(own) for client, own in found.items()}

    def segments(self, clients: Iterable[int] | None = None) -> list[Segment]:
        """Return what some clients did, or all, stretch by stretch."""
        wanted = None if clients is None else set(clients)
        ends = {row["job"]: row for row in self.ledger}
        running: dict[int, tuple[float, str]] = {}
        found = []
        for event in self.events:
            job, client = event.get("job"), event["client"]
            if job is None or (wanted is not None and client not in wanted):
                continue
            if job in running:
                since, phase = running.pop(job)
                end = ends.get(job, {})
                outcome = str(end.get("outcome", "unfinished"))
                late = end.get("staleness")
                if event["time_s"] > since:
                    found.append(Segment(client, job, since, event["time_s"], phase, outcome, late))
            if event["state"] in ("available", "training", "uploading"):
                phase = "uploading" if event["state"] == "uploading" else "training"
                running[job] = event["time_s"], phase
        return found

    def seconds_by_outcome(self) -> dict[str, float]:
        """Return the client-seconds of work that ended in each way."""
        found: dict[str, float] = defaultdict(float)
        for row in self.ledger:
            found[row["outcome"]] += row["download_s"] + row["train_s"] + row["upload_s"]
        return dict(found)

    def at_work(self, steps: int) -> tuple[list[float], list[int], list[int]]:
        """Return times, and how many clients train and how many send at each."""
        times = [self.end_s * (step + 0.5) / steps for step in range(steps)]
        change: dict[str, list[int]] = {key: [0] * (steps + 1) for key in ("training", "uploading")}
        width = self.end_s / steps if self.end_s else 1.0
        for segment in self.segments():
            first = min(max(round(segment.start_s / width), 0), steps)
            last = min(max(round(segment.end_s / width), 0), steps)
            change[segment.phase][first] += 1
            change[segment.phase][last] -= 1
        counts = {}
        for phase, moves in change.items():
            total, found = 0, []
            for move in moves[:steps]:
                total += move
                found.append(total)
            counts[phase] = found
        return times, counts["training"], counts["uploading"]


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
