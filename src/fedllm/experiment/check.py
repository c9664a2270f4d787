"""What a run would be, found out without training: its data, its clients, what it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedllm.config import Config
from fedllm.data import Dataset, HeterogeneityReport, Partition, heterogeneity
from fedllm.data.tokens import decoded
from fedllm.experiment import estimate
from fedllm.experiment.estimate import Duration, Memory
from fedllm.experiment.parts import build, check_length, load_data, plan_of, ranks_of
from fedllm.experiment.traffic import Traffic, traffic
from fedllm.experiment.world import WorldSummary, summary, world_of
from fedllm.system import RankRule, SimulatedWorld

if TYPE_CHECKING:
    from fedllm.models import SizeEstimate

MAX_RANKS_COUNTED = 10_000
"""Clients whose rank is looked up for the report; a fifth of a second."""


@dataclass(frozen=True)
class Example:
    """One training row as the model sees it."""

    row: int
    pieces: tuple[tuple[str, bool], ...]
    """Decoded text, and whether its tokens are supervised."""
    num_tokens: int
    label: str | None
    """Name of its class, or whether its answer is wanted, if it has one."""
    worse: tuple[tuple[str, bool], ...] = ()
    """Of a pair: the same row with the worse answer."""


@dataclass(frozen=True)
class Report:
    """All that `fedllm check` knows."""

    config: Config
    dataset: Dataset
    heterogeneity: HeterogeneityReport
    steps: npt.NDArray[np.int64]
    """Optimiser steps of each client in a round, shape (clients,)."""
    ranks: Mapping[int, int]
    """Possible rank to how many have it, of the first clients where there are very many."""
    size: SizeEstimate
    memory: Memory
    traffic: Traffic
    duration: Duration
    example: Example
    world: WorldSummary | None
    """In realistic mode."""


def check(config: Config, say: Callable[[str], None] = lambda text: None) -> Report:
    """Read and divide the data and work out what a run takes; no weight is loaded.

    Raises:
        FedLLMError: If something the user can mend is wrong.
    """
    from fedllm.models import load_tokenizer

    say("reading the data")
    tokenizer = load_tokenizer(config.model)
    dataset, partition = load_data(config, tokenizer)
    say("working out sizes")
    return report(config, dataset, partition, tokenizer)


def rehearse(config: Config, say: Callable[[str], None] = lambda text: None) -> Report:
    """Do everything that comes before the first round, model included, and write nothing.

    Raises:
        FedLLMError: If something the user can mend is wrong.
    """
    parts = build(config, say)
    say("working out sizes")
    return report(config, parts.dataset, parts.partition, parts.loaded.tokenizer)


def report(config: Config, dataset: Dataset, partition: Partition, tokenizer: Any) -> Report:
    """Describe a run whose data is there.

    Raises:
        ModelError: If the model, its architecture or a target is wrong.
        DataError: If rows are longer than the model's positions.
    """
    from fedllm.models import estimate_size, resolve_kind

    kind = resolve_kind(config.model, dataset.task)
    size = estimate_size(
        config.model,
        kind=kind,
        num_labels=len(dataset.label_names),
        targets=config.adapter.targets,
        rank=config.adapter.max_rank,
    )
    check_length(size.position_limit, config.model.path, dataset)
    shapes = estimate.shapes_of(config, kind, dataset.label_names)
    memory = estimate.memory(config, shapes, dataset, size.base_bytes)
    plan = plan_of(config)
    world = world_of(config, shapes, dataset)
    ranks = ranks_of(config, shapes.modules, shapes.head_parameters, world)
    moved = traffic(config, shapes, partition, ranks)
    return Report(
        config=config,
        dataset=dataset,
        heterogeneity=heterogeneity(partition, dataset.train.groups),
        steps=np.array([plan.steps(int(rows)) for rows in partition.train_sizes], np.int64),
        ranks=_count_ranks(config, ranks),
        size=size,
        memory=memory,
        traffic=moved,
        duration=estimate.duration(config, shapes, dataset, partition, memory.tokens_in_a_pass),
        example=_example(dataset, tokenizer),
        world=None if world is None else _world(config, world, partition, ranks, moved),
    )


def _world(
    config: Config, world: SimulatedWorld, partition: Partition, ranks: RankRule, moved: Traffic
) -> WorldSummary:
    sizes = partition.train_sizes
    return summary(config, world, sizes, plan_of(config), ranks, moved.job_bytes)


def _count_ranks(config: Config, rule: RankRule) -> dict[int, int]:
    """Count the clients of each rank that the configuration allows for, none left out."""
    known = range(min(config.federation.num_clients, MAX_RANKS_COUNTED))
    counts = Counter(rule.of(cid) for cid in known)
    return {rank: counts[rank] for rank in sorted(set(rule.choices))}


def _example(dataset: Dataset, tokenizer: Any) -> Example:
    """Decode the first row of ordinary length."""
    lengths = dataset.train.lengths
    row = int(np.argmin(np.abs(lengths - np.median(lengths))))
    train, label = dataset.train, None
    if train.labels is not None:
        label = dataset.label_names[int(train.labels[row])]
    elif train.desirable is not None:
        label = "wanted" if train.desirable[row] else "unwanted"
    worse = () if train.rejected is None else decoded(*train.rejected.row(row), tokenizer)
    pieces = decoded(*train.row(row), tokenizer)
    return Example(row, pieces, int(lengths[row]), label, worse)
