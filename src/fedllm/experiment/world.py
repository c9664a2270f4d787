"""From the configuration and what is known of the model to the world of a run."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedllm.config import Config, ranks_in
from fedllm.data import Dataset, Partition
from fedllm.errors import ConfigError
from fedllm.federation import (
    Plan,
    forward_passes,
    objective_of,
    trained_lengths,
    trained_share,
)
from fedllm.simulation import Population
from fedllm.system import Ideal, ModelCost, RankRule, SimulatedWorld, Work, World

if TYPE_CHECKING:
    from fedllm.experiment.estimate import Shapes

_LOOKED_AT = 1000
"""Clients that a summary is made of."""


def cost_of(config: Config, shapes: Shapes, dataset: Dataset) -> ModelCost:
    """Return what training the model on this data costs a device."""
    train = dataset.train
    objective = objective_of(config.training, dataset.task)
    devices = config.system.devices
    return ModelCost(
        body_parameters=shapes.body_parameters,
        table_parameters=shapes.table_parameters,
        layers=shapes.layers,
        hidden=shapes.hidden,
        intermediate=shapes.intermediate,
        vocabulary=shapes.vocabulary,
        rank_parameters=sum(sum(shape) for shape in shapes.modules.values()),
        head_parameters=0 if config.adapter.head == "frozen" else shapes.head_parameters,
        supervised=trained_share(train, objective),
        length=float(train.lengths.mean()),
        batch_tokens=float(trained_lengths(train, objective).mean()) * config.training.batch_size,
        forward_passes=forward_passes(objective),
        precision=devices.precision,
        checkpointing=devices.checkpointing,
    )


def world_of(config: Config, shapes: Shapes, dataset: Dataset) -> SimulatedWorld | None:
    """Return the world of realistic mode; None in prototype mode.

    Raises:
        ConfigError: If a file that it is made of cannot be read.
    """
    if config.mode == "prototype":
        return None
    return SimulatedWorld(config.system, cost_of(config, shapes, dataset), config.seed)


def or_ideal(world: SimulatedWorld | None) -> World:
    """Return a world, the ideal one where there is no other."""
    return Ideal() if world is None else world


def left_bytes(world: SimulatedWorld, cid: int) -> float:
    """Return the memory that a client's device has beside weights and activations."""
    return float(world.device(cid).memory_bytes - world.cost.fixed_bytes())


def too_small(config: Config, world: SimulatedWorld, ranks: RankRule) -> frozenset[int]:
    """Return the clients whose device cannot hold the training.

    Cost: nothing where every kind of device can hold every rank, else a draw for each client.

    Raises:
        ConfigError: If there are some and `system.devices.too_small` is `error`, or nobody is left.
    """
    most = world.cost.memory_bytes(max(ranks_in(config.adapter.rank)))
    if all(kind.memory_bytes >= most for kind in world.devices.kinds):
        return frozenset()
    clients = range(config.federation.num_clients)
    lacking: dict[str, int] = {}
    found = set()
    for cid in clients:
        device = world.device(cid)
        if world.cost.memory_bytes(ranks.of(cid)) > device.memory_bytes:
            found.add(cid)
            lacking[device.name] = lacking.get(device.name, 0) + 1
    if found and (config.system.devices.too_small == "error" or len(found) == len(clients)):
        raise ConfigError([_told(config, world, lacking)])
    return frozenset(found)


def _told(config: Config, world: SimulatedWorld, lacking: Mapping[str, int]) -> str:
    held = {kind.name: kind.memory_bytes for kind in world.devices.kinds}
    needed = world.cost.memory_bytes(min(ranks_in(config.adapter.rank)))
    who = ", ".join(
        f"{count} with {name} ({held[name] / 1e9:.3g} GB)" for name, count in lacking.items()
    )
    return (
        f"system.devices: {sum(lacking.values())} of {config.federation.num_clients} clients cannot"
        f" hold the training, which takes {needed / 1e9:.3g} GB at the smallest rank: {who}. Set"
        " system.devices.precision: nf4 or checkpointing: true, a smaller training.batch_size or"
        " rank, or leave these clients out with system.devices.too_small: exclude"
    )


def population_of(lengths: np.ndarray, shards: Partition, excluded: frozenset[int]) -> Population:
    """Return how much each client has to learn from; those left out have nothing."""
    ends = np.concatenate([[0], np.cumsum(lengths[shards.train_rows])])
    owned = np.diff(ends[shards.train_offsets])
    sizes = without(shards.train_sizes, excluded)
    return Population(*(array("q", own.astype(np.int64).tobytes()) for own in (sizes, owned)))


@dataclass(frozen=True)
class WorldSummary:
    """What a world is like for a run's clients, from a sample of them."""

    looked_at: int
    devices: Mapping[str, int]
    links: Mapping[str, int]
    there_at_start: float
    """Share of clients inside a window at time 0."""
    train_s: tuple[float, float, float]
    """Of a client's job: 10th, 50th and 90th percentile."""
    transfer_s: tuple[float, float, float]
    excluded: int
    """Clients whose device is too small."""


def summary(
    config: Config,
    world: SimulatedWorld,
    sizes: np.ndarray,
    plan: Plan,
    ranks: RankRule,
    nbytes: float,
) -> WorldSummary:
    """Describe a world.

    Args:
        config: The run's.
        world: Its world.
        sizes: Training rows of each client.
        plan: Steps and batches.
        ranks: Of the clients.
        nbytes: What one client receives and sends in a round, together.
    """
    pool = np.flatnonzero(sizes)
    cids = [int(cid) for cid in pool[:_LOOKED_AT]]
    train_s, transfer_s, there = [], [], 0
    for cid in cids:
        steps = plan.steps(int(sizes[cid]))
        rows = min(plan.rows_per_step, int(sizes[cid]))
        row_tokens = world.cost.batch_tokens / config.training.batch_size
        work = Work(steps, 1.0, row_tokens * rows, ranks.of(cid))
        train_s.append(world.fit_s(cid, work))
        half = int(nbytes / 2)
        transfer_s.append(world.download_s(cid, half, 0.0, 1) + world.upload_s(cid, half, 0.0, 1))
        window = world.window(cid, 0.0)
        there += window is not None and window[0] <= 0.0
    return WorldSummary(
        looked_at=len(cids),
        devices=dict(Counter(world.device(cid).name for cid in cids).most_common()),
        links=dict(Counter(world.link_name(cid) for cid in cids).most_common()),
        there_at_start=there / max(len(cids), 1),
        train_s=_percentiles(train_s),
        transfer_s=_percentiles(transfer_s),
        excluded=len(too_small(config, world, ranks)),
    )


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = np.percentile(values or [0.0], [10, 50, 90])
    return float(low), float(middle), float(high)


def without(sizes: np.ndarray, excluded: frozenset[int]) -> np.ndarray:
    """Return the rows of each client, none for those left out."""
    kept = sizes.copy()
    kept[list(excluded)] = 0
    return kept
