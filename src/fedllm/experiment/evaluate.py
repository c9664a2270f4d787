"""Evaluation of a run at its last checkpoint, on all test rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedllm.data import Partition
from fedllm.errors import DataError, RunError
from fedllm.evaluation import Evaluation, Scope
from fedllm.experiment.parts import Parts
from fedllm.experiment.run import restored


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation of a run found, and of what."""

    version: int | None
    """Server updates behind the model; None where it is no federated run's."""
    num_rows: int
    """Test rows that were used."""
    metrics: tuple[str, ...]
    """The first is the main one."""
    evaluation: Evaluation


def evaluate(
    path: Path,
    *,
    scopes: Sequence[Scope] | None = None,
    client: int | None = None,
    metrics: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] | None = None,
) -> Evaluated:
    """Restore a run's last checkpoint and evaluate it; the run is not changed.

    Args:
        path: The run directory.
        scopes: Which views; None takes what the run's configuration says.
        client: Use this client's test rows alone.
        metrics: Which metrics; None takes those of the run.
        say: Told what is being done.
        progress: Called with the number of answers generated so far.

    Raises:
        RunError: If there is no run, checkpoint or client.
        DataError: If the client has no test rows.
    """
    parts, _ = restored(path, say)
    evaluator = parts.evaluator
    if metrics is not None:
        chosen_metrics = evaluator.config.model_copy(update={"metrics": list(metrics)})
        evaluator = replace(evaluator, config=chosen_metrics)
    if client is not None:
        check_client(parts, client)
        evaluator = replace(evaluator, partition=_alone(parts.partition, client))
    say("evaluating")
    chosen = parts.scopes if scopes is None else tuple(scopes)
    found = evaluator.evaluate(
        parts.server, parts.loop.store, chosen, sample=False, progress=progress
    )
    rows = int(evaluator.partition.test_sizes.sum())
    return Evaluated(parts.server.version, rows, evaluator.names, found)


def check_client(parts: Parts, client: int) -> None:
    """Refuse a client that the run does not have.

    Raises:
        RunError: If there is no such client.
    """
    last = parts.partition.num_clients - 1
    if not 0 <= client <= last:
        raise RunError(f"There is no client {client}: this run has clients 0 to {last}")


def _alone(partition: Partition, client: int) -> Partition:
    """Return the partition with no test rows but this client's."""
    own = partition.test(client)
    if not len(own):
        held = np.flatnonzero(partition.test_sizes)[:10].tolist()
        raise DataError(
            f"Client {client} has no test rows. Clients that have some: {', '.join(map(str, held))}"
        )
    offsets = np.where(np.arange(partition.num_clients + 1) > client, len(own), 0)
    return replace(partition, test_rows=own, test_offsets=offsets.astype(np.int64))
