"""Runs jobs in this process, gathering the local training of all of them."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.federation import BaseClient, Engine, FitRequest, FitResult, Job, Progress, Update


@dataclass
class InlineExecutor:
    """One process, one resident base.

    The jobs' coroutines are driven up to their next fit; the fits of all are trained together, and
    the results sent back, until every job has returned. An algorithm that trains twice awaits
    twice, and its second passes are common again.
    """

    engine: Engine
    client: BaseClient
    progress: Progress | None = None

    def run(self, jobs: Sequence[Job]) -> list[Update]:
        """Return the update of each job, in the order of `jobs`."""
        updates: dict[int, Update] = {}
        waiting: dict[int, tuple[Coroutine[Any, Any, Update], FitResult | None]] = {
            i: (self.client.run(job, self.engine), None) for i, job in enumerate(jobs)
        }
        try:
            while waiting:
                requests: dict[int, FitRequest] = {}
                for i, (coroutine, result) in waiting.items():
                    try:
                        requests[i] = coroutine.send(result)
                    except StopIteration as done:
                        updates[i] = done.value
                if not requests:
                    break
                results = self.engine.train(list(requests.values()), self.progress)
                waiting = {
                    i: (waiting[i][0], result) for i, result in zip(requests, results, strict=True)
                }
        finally:
            # after an error some have not begun, and would warn that nobody awaited them
            for coroutine, _ in waiting.values():
                coroutine.close()
        return [updates[i] for i in range(len(jobs))]
