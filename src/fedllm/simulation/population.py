"""Who there is, as arrays: what a client costs that nobody has sent for."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.federation import BaseClient, ClientId, Job, Plan
from fedllm.system import Work


@dataclass
class Population:
    """The number of training rows of each client, and how long they are.

    Memory: 8 bytes a client for rows, 8 more where lengths are given.
    """

    sizes: Sequence[int]
    tokens: Sequence[int] | None = None
    """Tokens in all of its training rows; absent: one a row."""

    def pool(self) -> Sequence[ClientId]:
        """Return the clients that have something to learn from."""
        if all(size > 0 for size in self.sizes):
            return range(len(self.sizes))
        return [cid for cid, size in enumerate(self.sizes) if size > 0]

    def work(self, job: Job, client: BaseClient, plan: Plan, rank: int) -> Work:
        """Return the training of a job, as the cost model sees it."""
        rows, per_step = job.num_samples, plan.rows_per_step
        mean = 1.0 if self.tokens is None else self.tokens[job.cid] / rows
        return _work(job.steps, client.num_passes(job, per_step), mean, rows, per_step, rank)


@functools.lru_cache(4096)
def _work(
    steps: int, passes: float, mean_tokens: float, rows: int, rows_per_step: int, rank: int
) -> Work:
    """Return the work of clients that have equally many rows of the same mean length."""
    covered = _rows_in(steps, rows, rows_per_step)
    return Work(steps, passes, mean_tokens * covered / max(steps, 1), rank)


def _rows_in(steps: int, rows: int, rows_per_step: int) -> int:
    """Return the rows that so many steps go over; the last of each epoch may have fewer.

    >>> _rows_in(3, 10, 4), _rows_in(4, 10, 4)
    (10, 14)
    """
    epochs, rest = divmod(steps, math.ceil(rows / rows_per_step))
    return epochs * rows + min(rest * rows_per_step, rows)
