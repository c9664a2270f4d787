"""Made-up records of runs in virtual time, in the shapes that the loop writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from results_runs import config_yaml

from fedllm.results.run_dir import RunDir
from fedllm.results.timeline import Timeline

ENDS = {
    "arrived": "UPLOAD_DONE",
    "stale": "UPLOAD_DONE",
    "rejected": "UPLOAD_DONE",
    "window": "WINDOW_CLOSE",
    "dropout": "DROPOUT",
    "deadline": "CANCELLED",
    "surplus": "CANCELLED",
    "unfinished": "CANCELLED",
}


class Work(NamedTuple):
    """One job: 1 s of download, some of training, some of upload."""

    client: int
    began_s: float
    train_s: float
    upload_s: float
    outcome: str = "arrived"
    staleness: int = 0
    until_s: float | None = None
    """End of its client's window."""

    @property
    def trained_s(self) -> float:
        return self.began_s + 1.0 + self.train_s

    @property
    def ended_s(self) -> float:
        return self.trained_s + self.upload_s


def records(
    jobs: Sequence[Work], versions_s: Sequence[float] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return events and ledger; a job without an outcome goes on, and stands in no ledger."""
    events: list[dict[str, Any]] = []
    ledger = []
    for number, job in enumerate(jobs, start=1):

        def event(
            time_s: float, kind: str, state: str, client: int = job.client, job: int = number
        ) -> dict[str, Any]:
            own = {"time_s": time_s, "event": kind, "client": client, "job": job, "round": 1}
            events.append({**own, "state": state})
            return events[-1]

        event(job.began_s, "WINDOW_OPEN", "available")["until_s"] = job.until_s
        event(job.trained_s, "TRAINING_DONE", "uploading")
        if job.outcome:
            event(job.ended_s, ENDS[job.outcome], "idle")
            ledger.append(_line(number, job))
    nobody = {"client": None, "job": None, "round": 1, "state": None}
    events += [{"time_s": time_s, "event": "AGGREGATED", **nobody} for time_s in versions_s]
    return sorted(events, key=lambda line: line["time_s"]), ledger


def _line(number: int, job: Work) -> dict[str, Any]:
    return {
        "round": 1,
        "client": job.client,
        "job": number,
        "version": 0,
        "outcome": job.outcome,
        "began_s": job.began_s,
        "ended_s": job.ended_s,
        "download_s": 1.0,
        "train_s": job.train_s,
        "upload_s": job.upload_s,
        "steps": 4,
        "staleness": job.staleness if ENDS[job.outcome] == "UPLOAD_DONE" else None,
        "down_bytes": 2_000_000,
        "up_bytes": 1_000_000,
        "energy_j": 10.0,
    }


def course(jobs: Sequence[Work], versions_s: Sequence[float] = ()) -> Timeline:
    return Timeline(*records(jobs, versions_s))


def evaluated(number: int, score: float, **more: Any) -> dict[str, Any]:
    """A record of a round whose time, bytes and energy grow with its number."""
    total = {"up": 1e6, "down": 3e6, "up_total": 1e6 * number, "down_total": 3e6 * number}
    return {
        "round": number,
        "main_metric": "accuracy",
        "virtual_time_s": 3600.0 * number,
        "energy_total_j": 500.0 * number,
        "bytes": total,
        "eval": {"global": {"accuracy": score, "loss": 1.0 - score}},
        **more,
    }


def world_run(
    path: Path, jobs: Sequence[Work], rounds: Sequence[dict[str, Any]] = (), **sections: Any
) -> RunDir:
    """A run directory with these jobs and rounds."""
    run = RunDir.create(path, config_yaml(**sections))
    events, ledger = records(jobs, [record["virtual_time_s"] for record in rounds])
    run.append("events", events)
    run.append("ledger", ledger)
    run.append("metrics", rounds)
    run.close()
    return run
