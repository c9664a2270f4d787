"""Runs side by side: what each reached, in what time, for how many bytes and joules."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.config import read
from fedllm.errors import RunError
from fedllm.results import style
from fedllm.results.history import History, is_better, is_share
from fedllm.results.run_dir import CONFIG_FILE, RunDir
from fedllm.results.time_plots import time_unit

COSTS = {
    "round": "rounds",
    "virtual_time_s": "virtual time",
    "bytes_total": "bytes",
    "energy_total_j": "energy",
}
"""Places in `Course.costs` to what a reader calls them."""
_NOT_COMPARED = ("name", "output_dir", "seed")
"""Keys in which runs of one group may differ."""


@dataclass(frozen=True)
class Course:
    """One run: the main metric, and what had been spent at each evaluation."""

    path: Path
    config: Mapping[str, Any]
    metric: str
    view: str
    values: Mapping[int, float]
    """Round to value."""
    costs: Mapping[str, Mapping[int, float]]
    """Kind of cost (see `COSTS`) to what was spent up to each round."""

    @property
    def last(self) -> float:
        """Value at the last evaluation."""
        return self.values[max(self.values)]

    @property
    def best(self) -> float:
        """The best of all values."""
        best = self.last
        for value in self.values.values():
            best = value if is_better(self.metric, value, best) else best
        return best

    def to_reach(self, target: float, cost: str) -> float | None:
        """Return what was spent when a value was first reached; None if it never was."""
        for number in sorted(self.values):
            if not is_better(self.metric, target, self.values[number]):
                return self.costs[cost].get(number, 0.0)
        return None


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    mean: float
    deviation: float
    """Of the sample; 0 for one."""
    count: int
    """Of how many runs it is known."""

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """Sum up what is known; None if nothing is."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        deviation = statistics.stdev(known) if len(known) > 1 else 0.0
        return cls(statistics.fmean(known), deviation, len(known))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str
    runs: Sequence[Course]
    settings: Mapping[str, Any]
    """What tells it from other groups: place in the configuration to value."""
    figures: Mapping[str, Spread | None]
    """`last`, `best`, totals of each cost, and `to_target` of each."""


def compare(
    paths: Sequence[Path], target: float | None = None, metric: str | None = None
) -> list[Group]:
    """Sum runs up, those that differ in their seed alone together.

    Args:
        paths: Run directories.
        target: Value of the metric whose cost is asked for.
        metric: Which one; by default the main metric, which must then be common.

    Raises:
        RunError: If one is no run, was not evaluated, or they have no metric in common.
    """
    runs = [_course(RunDir.open(path), metric) for path in paths]
    metrics = {run.metric for run in runs}
    if len(metrics) > 1:
        raise RunError(
            f"the runs are judged by different metrics ({', '.join(sorted(metrics))}). Choose one"
            " that all have with --target METRIC=VALUE"
        )
    flat = [_flat(run.config) for run in runs]
    differing = sorted(
        key
        for key in {key for own in flat for key in own}
        if len({repr(f.get(key)) for f in flat}) > 1
    )
    told = [key for key in differing if key not in _NOT_COMPARED]
    members: dict[str, list[int]] = {}
    for place, own in enumerate(flat):
        members.setdefault(repr([own.get(key) for key in told]), []).append(place)
    groups = []
    for places in members.values():
        settings = {key: flat[places[0]].get(key) for key in told}
        chosen = [runs[place] for place in places]
        label = _label(settings) or chosen[0].path.name
        groups.append(Group(label, chosen, settings, _figures(chosen, target)))
    return groups


def _label(settings: Mapping[str, Any]) -> str:
    """Return what tells a group from others; where forms differ, the rest of a form is left out."""
    named = {key.rpartition(".")[0] for key in settings if key.endswith((".name", ".kind"))}
    words = []
    for key, value in settings.items():
        section, _, own = key.rpartition(".")
        if own in ("name", "kind"):
            words.append(str(value))
        elif section not in named:
            words.append(f"{own} {value}")
    return ", ".join(words)


def _figures(runs: Sequence[Course], target: float | None) -> dict[str, Spread | None]:
    found = {
        "last": Spread.of([run.last for run in runs]),
        "best": Spread.of([run.best for run in runs]),
    }
    for cost in COSTS:
        totals = [max(run.costs[cost].values(), default=0.0) for run in runs]
        found[cost] = Spread.of(list(totals))
        if target is not None:
            found[f"{cost} to target"] = Spread.of([run.to_reach(target, cost) for run in runs])
    return found


def _course(run: RunDir, asked: str | None) -> Course:
    history = History.of(run)
    metric = asked or history.main_metric
    if metric is None or metric not in history.metrics:
        have = (
            f"it has {', '.join(history.metrics)}" if history.metrics else "nothing was evaluated"
        )
        raise RunError(f"{run.path} has no {metric or 'metric'} to compare by: {have}")
    view = next(
        v for v in ("global", "personal mean", "client mean") if history.evaluated(v, metric)
    )
    series = history.evaluated(view, metric)
    up, down = (history.totals("bytes", f"{way}_total") for way in ("up", "down"))
    costs = {
        "round": {number: float(number) for number in series.rounds},
        "virtual_time_s": history.totals("virtual_time_s"),
        "bytes_total": {number: up[number] + down.get(number, 0.0) for number in up},
        "energy_total_j": history.totals("energy_total_j"),
    }
    values = dict(zip(series.rounds, series.values, strict=True))
    return Course(run.path, read(run.path / CONFIG_FILE), metric, view, values, costs)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every leaf of a configuration by its place.

    >>> _flat({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        place = f"{prefix}{key}"
        found |= _flat(value, f"{place}.") if isinstance(value, Mapping) else {place: value}
    return found


def draw(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Draw the metric of every run against each cost, a colour for each group.

    Returns:
        The files written; a cost that no run has is left out.

    Raises:
        RunError: If a file is there already.
    """
    written = []
    for cost, name in COSTS.items():
        end = max(max(r.costs[cost].values(), default=0.0) for g in groups for r in g.runs)
        path = folder / f"{cost}.png"
        if end <= 0.0:
            continue
        if path.exists():
            raise RunError(f"{path} exists, and nothing is overwritten; choose another folder")
        unit, unit_name = _unit(cost, end)
        figure = style.panels(size=(7.0, 4.2))
        axes = figure.axes[0]
        for place, group in enumerate(groups):
            color = style.PALETTE[place % len(style.PALETTE)]
            for number, run in enumerate(group.runs):
                points = [(run.costs[cost].get(x, 0.0) / unit, y) for x, y in run.values.items()]
                label = group.label if number == 0 else None
                axes.plot(*zip(*points, strict=True), color=color, marker=".", label=label)
        metric = groups[0].runs[0].metric
        axes.set_xlabel(f"{name} ({unit_name})" if unit_name else name)
        style.metric_axis(axes.yaxis, metric)
        if is_share(metric):
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize="small")
        written.append(style.save(figure, path))
    return written


def _unit(cost: str, end: float) -> tuple[float, str]:
    if cost == "virtual_time_s":
        return time_unit(end)
    return {"bytes_total": (1e6, "MB"), "energy_total_j": (1e3, "kJ")}.get(cost, (1.0, ""))
