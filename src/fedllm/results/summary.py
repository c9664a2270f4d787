"""The figures of a run as data, for whoever prints them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.config import is_central, read, validate, validate_central
from fedllm.errors import ConfigError
from fedllm.results.history import VIEWS, History, Series, is_better
from fedllm.results.run_dir import CONFIG_FILE, RunDir


@dataclass(frozen=True)
class MetricRow:
    """One metric of one view over the run."""

    metric: str
    view: str
    """A name in `fedllm.results.history.VIEWS`."""
    first: float
    """Value at the first evaluation, normally before training."""
    last: float
    best: float
    best_round: int
    """The earliest round that reached the best value."""
    is_main: bool


@dataclass(frozen=True)
class Overview:
    """What a run was and what it took."""

    name: str
    algorithm: str
    model: str
    data: str
    partition: str
    seed: int
    num_clients: int
    cohort_size: int
    rounds_done: int
    rounds_planned: int
    bytes_up: int
    bytes_down: int
    wall_s: float
    """Seconds by the clock, over all records of timing.jsonl."""
    server_s: float
    """Seconds of aggregation, over all rounds."""
    agg_error: float | None
    """Mean over rounds of the distance to the ideal mean update; None where there is no ideal."""
    last_agg_error: float | None
    """The same in the last round in which it is known."""
    rejected: int
    """Updates that the server refused."""
    virtual_s: float
    """Virtual time at the end; 0 in prototype mode."""
    energy_j: float
    """Joules of all clients."""
    outcomes: Mapping[str, int]
    """How many jobs ended in which way, the most frequent first."""
    ended: str
    """Why the run ended before its last round, if it did."""
    privacy: Mapping[str, Any] | None
    """What may be claimed after the last round, if privacy was asked for."""
    steps: int | None = None
    """Optimiser steps of a central run, whose rounds are its evaluations; None for others."""

    @property
    def is_finished(self) -> bool:
        """Whether all planned rounds are done, or none will follow."""
        return self.rounds_done >= self.rounds_planned or bool(self.ended)


def overview(run: RunDir) -> Overview:
    """Return what a run was and what it took.

    Raises:
        ConfigError: If its configuration is not one of this version's.
    """
    source = run.path / CONFIG_FILE
    tree = read(source)
    if is_central(tree):
        return _central_overview(run, tree)
    config, problems = validate(tree)
    if config is None:
        raise ConfigError(problems, str(source))
    ledger, timing, records = run.read("ledger"), run.read("timing"), run.read("metrics")
    errors = [r["agg_error"] for r in records if r.get("agg_error") is not None]
    return Overview(
        name=run.path.name,
        algorithm=config.algorithm.name,
        model=config.model.path,
        data=config.data.source,
        partition=config.federation.partition.name,
        seed=config.seed,
        num_clients=config.federation.num_clients,
        cohort_size=config.federation.cohort,
        rounds_done=History.of(run).last_round,
        rounds_planned=config.federation.rounds,
        bytes_up=sum(entry["up_bytes"] for entry in ledger),
        bytes_down=sum(entry["down_bytes"] for entry in ledger),
        wall_s=sum(entry["wall_s"] for entry in timing),
        server_s=sum(entry.get("aggregate", 0.0) for entry in timing),
        agg_error=sum(errors) / len(errors) if errors else None,
        last_agg_error=errors[-1] if errors else None,
        rejected=sum(len(record.get("rejected", ())) for record in records),
        virtual_s=max((r.get("virtual_time_s", 0.0) for r in records), default=0.0),
        energy_j=sum(entry.get("energy_j", 0.0) for entry in ledger),
        outcomes=dict(Counter(entry.get("outcome", "arrived") for entry in ledger).most_common()),
        ended=next((r["ended"] for r in reversed(records) if r.get("ended")), ""),
        privacy=next((r["privacy"] for r in reversed(records) if r.get("privacy")), None),
    )


def _central_overview(run: RunDir, tree: Mapping[str, Any]) -> Overview:
    """Return what a central run was: one client with all rows; its rounds are its evaluations."""
    config, problems = validate_central(tree)
    if config is None:
        raise ConfigError(problems, str(run.path / CONFIG_FILE))
    timing, records = run.read("timing"), run.read("metrics")
    return Overview(
        name=run.path.name,
        algorithm=f"central {config.stage}, {config.adapter.method}",
        model=config.model.path,
        data=config.data.source,
        partition="all rows",
        seed=config.seed,
        num_clients=1,
        cohort_size=1,
        rounds_done=History.of(run).last_round,
        rounds_planned=records[-1]["rounds_planned"] if records else 1,
        bytes_up=0,
        bytes_down=0,
        wall_s=sum(entry["wall_s"] for entry in timing),
        server_s=0.0,
        agg_error=None,
        last_agg_error=None,
        rejected=0,
        virtual_s=0.0,
        energy_j=0.0,
        outcomes={},
        ended=next((r["ended"] for r in reversed(records) if r.get("ended")), ""),
        privacy=None,
        steps=int(records[-1]["step"]) if records else 0,
    )


def summary_rows(run: RunDir) -> list[MetricRow]:
    """Return a row for each metric and view that was evaluated, the main metric first."""
    history = History.of(run)
    rows = []
    for metric in history.metrics:
        for view in VIEWS:
            series = history.evaluated(view, metric)
            if series:
                rows.append(_row(metric, view, series, metric == history.main_metric))
    return rows


def _row(metric: str, view: str, series: Series, is_main: bool) -> MetricRow:
    best_round, best = series.rounds[0], series.values[0]
    for number, value in zip(series.rounds, series.values, strict=True):
        if is_better(metric, value, best):
            best_round, best = number, value
    return MetricRow(
        metric=metric,
        view=view,
        first=series.values[0],
        last=series.values[-1],
        best=best,
        best_round=best_round,
        is_main=is_main,
    )
