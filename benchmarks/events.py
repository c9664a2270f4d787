"""The event loop with training stubbed out; `python -m benchmarks.events`.

Clients have 20 windows each in flat arrays, cohorts are of 100, and every duration is a constant.
The algorithm, its messages and the checks of updates are stubbed with the training: what is
measured is choosing clients, dispatching them, events, records and aggregations without tensors,
and, as `written_events_per_s`, with the lines that a run's directory gets.
Each size runs in a process of its own; seconds are those of the processor.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from fedllm.adapters import Adapter
from fedllm.config import TrainingConfig
from fedllm.federation import BaseClient, BaseServer, ClientId, Job, Part, Payload, Plan, Update
from fedllm.federation.transport import Transport
from fedllm.results import strict_json
from fedllm.simulation import Loop, Population, Reception, Sync
from fedllm.system import Ideal, Work
from fedllm.system.traces import WindowTrace

SIZES = (1_000, 100_000, 1_000_000)
WINDOWS, COHORT, ROUNDS, WRITTEN, RUNS = 20, 100, 300, 100, 3
REFERENCE_EVENTS_PER_S = 263
"""The published reference's loop with 1,000 clients of 20 windows each, measured in 2026."""
_NOTHING = Adapter({})
_JOB = Job(0, Payload(0, _NOTHING)).filled()
"""Copied for every client; a copy of a copy is the cheapest stub of a job."""
_STATE: dict[str, Any] = {}


class Nothing:
    """An update that takes no time to make: like `Update`, of which it has what the loop asks."""

    __slots__ = ("cid", "num_samples", "state", "version")

    def __init__(self, cid: int, version: int) -> None:
        self.cid, self.version, self.num_samples, self.state = cid, version, 5, _STATE


class Server(BaseServer):
    """Sends nothing and aggregates nothing."""

    has_mean: ClassVar[bool] = False

    def local_run(self, cohort: Iterable[ClientId]) -> Iterable[Job]:
        """Give everyone the same."""
        payload = Payload(self.version, _NOTHING)
        for cid in cohort:
            yield _JOB.filled(cid=cid, payload=payload)

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Leave everything as it is."""


class Training:
    """Returns at once."""

    def run(self, jobs: Sequence[Job]) -> list[Update]:
        """Return an empty update for each job."""
        return cast("list[Update]", [Nothing(job.cid, job.payload.version) for job in jobs])


class Bytes(Transport):
    """Counts a constant."""

    def send_down(self, payload: Payload, server: BaseServer) -> Payload:
        """Return the payload."""
        return payload

    def down_nbytes(self, payload: Payload) -> int:
        """Return a constant."""
        return 1_000

    def up_nbytes(self, client: BaseClient, job: Job) -> int:
        """Return a constant."""
        return 1_000


class Unchecked(Reception):
    """Takes everything."""

    def receive(self, update: Update, job: Job, client: BaseClient) -> tuple[Update, int, str]:
        """Return the update."""
        return update, 1_000, ""


class World(Ideal):
    """Windows from a trace, and constant durations."""

    def __init__(self, trace: WindowTrace) -> None:
        self.window = trace.window  # type: ignore[method-assign, assignment]
        self.windows = trace.windows  # type: ignore[method-assign, assignment]
        self.trace = trace

    @property
    def presence(self) -> float:
        """Return the trace's."""
        return self.trace.presence

    def fit_s(self, cid: int, work: Work) -> float:
        """Return five minutes."""
        return 300.0

    def download_s(self, cid: int, nbytes: int, time_s: float, sharing: int) -> float:
        """Return two seconds."""
        return 2.0

    def upload_s(self, cid: int, nbytes: int, time_s: float, sharing: int) -> float:
        """Return five seconds."""
        return 5.0


def trace_of(clients: int, shortest_s: int, longest_s: int) -> WindowTrace:
    """Draw windows and the gaps between them."""
    stream = np.random.default_rng(0)
    edges = stream.integers(shortest_s, longest_s, size=(clients, 2 * WINDOWS), dtype=np.int32)
    np.cumsum(edges, axis=1, out=edges)
    opens, closes = edges[:, 0::2].ravel(), edges[:, 1::2].ravel()
    offsets = np.arange(clients + 1, dtype=np.int64) * WINDOWS
    return WindowTrace.from_arrays(opens, closes, offsets, float(edges.max()) + 600.0)


def measure(clients: int, *, is_pausing: bool = False) -> dict[str, float]:
    """Return events a second, seconds a round and of the start, and memory at the peak.

    Args:
        clients: How many.
        is_pausing: Windows of 1 to 4 minutes, which jobs of five minutes pause between, instead of
            10 to 120 minutes and lost work.
    """
    begin = time.process_time()
    server = Server()
    server.start(_NOTHING, server.ranks)
    loop = Loop(
        server=server,
        client=BaseClient(),
        world=World(trace_of(clients, *((60, 240) if is_pausing else (600, 7200)))),
        executor=Training(),
        plan=Plan(TrainingConfig(local_steps=3), 10**9),
        population=Population(array("i", [5]) * clients),
        seed=0,
        schedule=Sync(cohort_size=COHORT),
        reception=Unchecked(Bytes()),
        at_window_close="pause" if is_pausing else "discard",
    )
    start_s = time.process_time() - begin
    list(loop.run(20))  # imports, and first touches of memory
    begin, events = time.process_time(), 0
    for made in loop.run(20 + ROUNDS):
        events += len(made.events)
    took = time.process_time() - begin
    begin, written = time.process_time(), 0
    for made in loop.run(20 + ROUNDS + WRITTEN):
        written += len(made.events)
        "".join(strict_json(line) + "\n" for lines in (made.events, made.ledger) for line in lines)
    return {
        "events_per_s": events / took,
        "written_events_per_s": written / (time.process_time() - begin),
        "round_s": took / ROUNDS,
        "start_s": start_s,
        "rss_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """Return the most memory this process has held; `getrusage` counts that of its parent, too."""
    rows = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (row for row in rows if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Measure each size in turn, several times, and write the medians."""
    from benchmarks.measure import write

    kinds = [*([str(size)] for size in SIZES), [str(SIZES[-1]), "pausing"]]
    runs: dict[str, list[dict[str, float]]] = {"_".join(kind): [] for kind in kinds}
    for _ in range(RUNS):
        for kind in kinds:
            words = [sys.executable, "-W", "ignore", "-m", "benchmarks.events", *kind]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            runs["_".join(kind)].append(json.loads(done.stdout))
    found: dict[str, Any] = {
        f"clients_{name}": {key: float(np.median([run[key] for run in own])) for key in own[0]}
        for name, own in runs.items()
    }
    small, large = (found[f"clients_{size}"] for size in (SIZES[0], SIZES[-1]))
    found["round_at_largest_vs_smallest"] = large["round_s"] / small["round_s"]
    found["vs_reference_at_1000"] = small["events_per_s"] / REFERENCE_EVENTS_PER_S
    write("events", found)
    for name, value in found.items():
        print(name, value)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]), is_pausing="pausing" in sys.argv)))
    else:
        main()
