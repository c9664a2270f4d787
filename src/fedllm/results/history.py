"""The course of a run, read from its metrics: what plots and tables are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedllm.results.run_dir import RunDir

VIEWS: Mapping[str, tuple[str, ...]] = {
    "global": ("global",),
    "client mean": ("clients", "mean"),
    "worst 10 % of clients": ("clients", "worst_10"),
    "personal mean": ("personal", "mean"),
    "personal, worst 10 %": ("personal", "worst_10"),
}
"""Name of a view (who is tested, and how it is summed up) to its place in an evaluation."""

_FALLING = frozenset({"loss", "perplexity", "preference_loss"})


@dataclass(frozen=True)
class Series:
    """A quantity over rounds, only where it is known."""

    rounds: tuple[int, ...]
    values: tuple[float, ...]

    def __bool__(self) -> bool:
        return bool(self.rounds)


@dataclass(frozen=True)
class History:
    """All records of `metrics.jsonl`, by round."""

    records: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, run: RunDir) -> History:
        """Read the history of a run."""
        return cls(tuple(run.read("metrics")))

    @property
    def last_round(self) -> int:
        """The last round that was recorded; 0 if none was."""
        return max((record["round"] for record in self.records), default=0)

    @cached_property
    def main_metric(self) -> str | None:
        """The metric the run is judged by, if it was evaluated."""
        return next((r["main_metric"] for r in self.records if "main_metric" in r), None)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """All metrics of any view, the main one first, then in alphabetical order."""
        found = {
            metric
            for record in self.records
            for place in VIEWS.values()
            for metric in _at(record, "eval", *place)
        }
        return tuple(sorted(found, key=lambda metric: (metric != self.main_metric, metric)))

    def series(self, *path: str) -> Series:
        """Return a quantity by its place in the records.

        >>> History(({"round": 1, "train": {"loss": 2.0}},)).series("train", "loss")
        Series(rounds=(1,), values=(2.0,))
        """
        *parents, last = path
        points = [(r["round"], _at(r, *parents).get(last)) for r in self.records]
        known = [(x, y) for x, y in points if y is not None]
        return Series(tuple(x for x, _ in known), tuple(y for _, y in known))

    def evaluated(self, view: str, metric: str) -> Series:
        """Return a metric of a view (see `VIEWS`)."""
        return self.series("eval", *VIEWS[view], metric)

    def totals(self, *path: str) -> dict[int, float]:
        """Return a quantity by round, only where it is known."""
        found = self.series(*path)
        return dict(zip(found.rounds, found.values, strict=True))

    def client_losses(self) -> list[tuple[int, list[float]]]:
        """Return round and training losses of its clients, for each round that trained."""
        rounds = []
        for record in self.records:
            clients = _at(record, "train").get("clients", ())
            losses = [c["loss"] for c in clients if c["loss"] is not None]
            if losses:
                rounds.append((record["round"], losses))
        return rounds

    def by_client(self, part: str, metric: str) -> dict[int, float]:
        """Return the last known value of each client; `part` is `clients` or `personal`."""
        last: dict[int, float] = {}
        for record in self.records:
            for client, values in _at(record, "eval", part, "by_client").items():
                if values.get(metric) is not None:
                    last[int(client)] = values[metric]
        return dict(sorted(last.items()))


def is_better(metric: str, value: float, than: float) -> bool:
    """Tell whether one value of a metric is strictly better than another."""
    return value < than if metric in _FALLING else value > than


def is_share(metric: str) -> bool:
    """Tell whether a metric is a share from 0 to 1, where more is better."""
    return metric not in _FALLING


def _at(record: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """Return the mapping at a place in a record; an empty one where there is none."""
    for part in path:
        record = record.get(part) or {}
    return record
