"""How many bytes a run moves, found by playing its first rounds without training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedllm import algorithms
from fedllm.adapters import Adapter
from fedllm.adapters.names import name_a, name_b
from fedllm.config import Config
from fedllm.data import Partition
from fedllm.executors import InlineExecutor
from fedllm.experiment.exchange import reception_of, transport_of
from fedllm.experiment.parts import plan_of, ranks_of, scaling_of
from fedllm.experiment.schedules import schedule_of
from fedllm.federation import BaseClient, Engine, FitRequest, FitResult, Job, Progress
from fedllm.simulation import Loop, Population
from fedllm.system import Ideal, RankRule

if TYPE_CHECKING:
    import torch

    from fedllm.experiment.estimate import Shapes

_JOBS_PLAYED = 400
"""About so many, each a few milliseconds: most runs are played to their end, stages and all."""
_FEWEST_ROUNDS = 4
"""Enough to see algorithms that alternate, and a base that grows."""


@dataclass(frozen=True)
class Traffic:
    """Mean bytes of all jobs that end in a round."""

    up_bytes: float
    down_bytes: float
    rounds_played: int
    """Over how many rounds the mean is taken."""
    grows: bool
    """Whether later rounds send more, because what is sent accumulates."""
    job_bytes: float
    """Mean bytes of one job, in both directions."""


def traffic(config: Config, shapes: Shapes, partition: Partition, ranks: RankRule) -> Traffic:
    """Play the first rounds with tensors that have a shape and no memory, and read the ledger.

    The loop, the algorithm and its payloads are the real ones, so the bytes are exact; only local
    training is left out.
    """
    within = max(_FEWEST_ROUNDS, _JOBS_PLAYED // config.federation.cohort)
    rounds = min(config.federation.rounds, within)
    sizes = partition.train_sizes.tolist()
    loop = untrained_loop(config, shapes.modules, shapes.heads, sizes, ranks=ranks)
    played = list(loop.run(rounds))
    rows = [row for made in played for row in made.ledger if row["outcome"] == "arrived"]
    down, up = (sum(row[key] for row in rows) for key in ("down_bytes", "up_bytes"))
    grows = bool(loop.server.base.sizes)
    each = (up + down) / max(len(rows), 1)
    return Traffic(up / rounds, down / rounds, rounds, grows, each)


def untrained_loop(
    config: Config,
    modules: Mapping[str, tuple[int, int]],
    heads: Mapping[str, tuple[int, ...]],
    sizes: Sequence[int],
    engine: Engine | None = None,
    ranks: RankRule | None = None,
) -> Loop:
    """Return the loop of a run whose tensors have only shapes.

    Args:
        config: The run's.
        modules: Layer to (out, in).
        heads: Tensors of a classification head.
        sizes: Training rows of each client.
        engine: What serves the fits; by default clients end where they start.
        ranks: Of the clients; by default as configured.
    """
    chosen, head = config.algorithm, config.adapter.head
    server, client = algorithms.make(chosen.name, chosen.settings, head)
    server.start(
        _start(config, modules, heads),
        ranks or ranks_of(config, modules, sum(math.prod(shape) for shape in heads.values())),
        head,
        num_clients=config.federation.num_clients,
        rounds=config.federation.rounds,
        weight_of=lambda layer: _shaped(modules[layer]),
        downlink=transport_of(config).downlink,
    )
    return Loop(
        server=server,
        client=client,
        world=Ideal(),
        executor=InlineExecutor(engine or Untrained(), client),
        plan=plan_of(config),
        population=Population(sizes),
        schedule=schedule_of(config.federation),
        seed=config.seed,
        reception=reception_of(config),
    )


def _shaped(shape: Sequence[int]) -> torch.Tensor:
    import torch

    return torch.empty(tuple(shape), device="meta")


def _start(
    config: Config,
    modules: Mapping[str, tuple[int, int]],
    heads: Mapping[str, tuple[int, ...]],
) -> Adapter:
    rank = config.adapter.max_rank
    tensors = {}
    for module, (rows, columns) in modules.items():
        tensors[name_a(module)] = _shaped((rank, columns))
        tensors[name_b(module)] = _shaped((rows, rank))
    tensors |= {name: _shaped(shape) for name, shape in heads.items()}
    return Adapter(tensors, dict.fromkeys(modules, scaling_of(config)))


class Untrained:
    """An engine whose clients end where they start."""

    def fit(self, job: Job, start: Adapter, client: BaseClient, *, tag: str = "") -> FitRequest:
        """Ask for nothing."""
        return FitRequest(job, start, client, tag)

    def gradient(
        self, job: Job, start: Adapter, client: BaseClient, *, tag: str = ""
    ) -> FitRequest:
        """Ask for nothing, of the same shapes."""
        return FitRequest(job, start, client, tag, is_gradient=True)

    def train(
        self, requests: Sequence[FitRequest], progress: Progress | None = None
    ) -> list[FitResult]:
        """Return each start as it is."""
        metrics = {"loss": 0.0, "tokens": 0.0, "rate_sum": 1.0}
        return [FitResult(r.start, r.job.steps, metrics) for r in requests]
