"""Executors that worker processes make in tests; spawned processes import them from here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters import Adapter
from fedllm.errors import TrainingError
from fedllm.federation import Job, Progress, Update


@dataclass(frozen=True)
class Stub:
    """Makes executors that do something with each job, as `what` says."""

    what: str = "double"

    def __call__(self, progress: Progress, worker: int) -> StubExecutor:
        if self.what == "cannot start":
            raise TrainingError("the model is not there")
        return StubExecutor(self.what, progress, worker)


@dataclass
class StubExecutor:
    what: str
    progress: Progress
    worker: int

    def run(self, jobs: Sequence[Job]) -> list[Update]:
        return [self._one(job) for job in jobs]

    def _one(self, job: Job) -> Update:
        if self.what == "die" and job.cid == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "ours" and job.cid == 3:
            raise TrainingError("client 3 has no loss")
        if self.what == "theirs" and job.cid == 3:
            raise ZeroDivisionError("nothing left")
        if self.what == "slow first" and self.worker == 0:
            time.sleep(0.3)
        self.progress(job.cid, 1, job.steps)
        doubled = {n: t * 2 for n, t in job.payload.adapter.tensors.items()}
        metrics = {"worker": float(self.worker), "pid": float(os.getpid())}
        metrics["threads"] = float(torch.get_num_threads())
        return Update(
            job.cid, job.version, Adapter(doubled), job.num_samples, job.steps, metrics=metrics
        )
