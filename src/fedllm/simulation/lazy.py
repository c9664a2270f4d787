"""When jobs are computed: as late as possible, and then all together whose inputs are known.

A job's result can only matter when its update arrives. What is certain not to arrive, or is not
needed any more, is never computed.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedllm.federation import ClientId, Executor, Job, Update
from fedllm.simulation.flights import Flight

_client = operator.attrgetter("cid")


@dataclass
class Computation:
    """Runs jobs, and keeps what has been computed and has not arrived."""

    executor: Executor
    compute: Literal["lazy", "eager"] = "lazy"
    """`eager` runs each job alone when it is given out."""
    lost: Literal["skip", "compute"] = "skip"
    """`compute` runs what is certain to be lost, too, apart from the rest; it changes nothing."""
    results: dict[ClientId, Update] = field(default_factory=dict)
    running: Sequence[Job] = ()
    """What is being computed, or has been last."""
    wall_s: float = 0.0
    """Real seconds since they were last asked for."""

    def begin(self, flights: Iterable[Flight]) -> None:
        """Compute new jobs at once, where that is asked for."""
        if self.compute == "eager":
            for flight in flights:
                if not flight.is_doomed or self.lost == "compute":
                    self._run([flight.job])

    def compute_with(self, flight: Flight, others: Iterable[Flight], room: int | None) -> None:
        """Compute a job whose result is needed now, and others along with it.

        Args:
            flight: Its client.
            others: Clients at work, whose jobs may run with it.
            room: How many results, this one included, can still be used; None for any number.
        """
        results = self.results
        waiting = [f for f in others if not f.is_doomed and f.job.cid not in results]
        if room is not None and len(waiting) >= room:
            waiting.sort(key=lambda f: (f.expected_s, f.number))
            waiting = waiting[: max(room - 1, 0)]
        jobs = [flight.job, *[f.job for f in waiting]]
        jobs.sort(key=_client)
        self._run(jobs)

    def drop(self, flight: Flight) -> None:
        """Forget a job that is lost."""
        if self.lost == "compute" and flight.cid not in self.results:
            self._run([flight.job])
        self.results.pop(flight.cid, None)

    def spent_s(self) -> float:
        """Return the real seconds since this was last asked, of which no two runs have the same."""
        spent, self.wall_s = self.wall_s, 0.0
        return spent

    def _run(self, jobs: Sequence[Job]) -> None:
        begin, self.running = time.perf_counter(), jobs
        # filed under the job that is answered, whoever an update says it is from
        cids = [job.cid for job in jobs]
        self.results.update(zip(cids, self.executor.run(jobs), strict=True))
        self.wall_s += time.perf_counter() - begin
