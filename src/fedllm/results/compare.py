"""Runs side by side: what each reached, in what time, for how many bytes and joules."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.config import is_central, read
from fedllm.errors import RunError, did_you_mean
from fedllm.results.compare_labels import in_common, names
from fedllm.results.history import History, is_better
from fedllm.results.run_dir import CONFIG_FILE, RunDir

COSTS = {
    "round": "rounds",
    "virtual_time_s": "virtual time",
    "bytes_total": "bytes",
    "energy_total_j": "energy",
}
"""What quality is paid with: places in `Course.costs` to what a reader calls them."""
TOTALS = {
    "round": "rounds",
    "virtual_time_s": "virtual time",
    "bytes_up": "bytes up",
    "bytes_down": "bytes down",
    "energy_total_j": "energy",
}
"""What is told of whole runs; places as in `COSTS`."""
_COMMON_VIEWS = ("global", "personal mean", "client mean")
_NOT_COMPARED = re.compile(r"(name|output_dir|seed)$|execution\.")
"""Keys in which runs of one group may differ: where a run is computed is not part of its result."""
_MOST_TOLD = 4
"""Settings that a label may name; groups that differ in more are called by their first run."""


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
    """Kind of cost (see `COSTS` and `TOTALS`) to what was spent up to each round.

    Empty where nothing is known: time and energy of prototype mode, and of older runs.
    """
    is_finished: bool = True
    """Whether all of its rounds are done, or it has ended for a reason of its own."""

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

    def spent(self, cost: str, number: int | None = None) -> float | None:
        """Return what was spent up to a round, or in all; None if that is not known."""
        known = self.costs[cost]
        until = [x for x in known if number is None or x <= number]
        return known[max(until)] if until else 0.0 if known else None

    def to_reach(self, target: float, cost: str) -> float | None:
        """Return what was spent when a value was first reached; None if it never was."""
        for number in sorted(self.values):
            if not is_better(self.metric, target, self.values[number]):
                return self.spent(cost, number)
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
    """`last`, `best`, each of `TOTALS`, and each of `COSTS` with ` to target` after it.

    None where nothing is known, or no run reached the target.
    """


def compare(
    paths: Sequence[Path], target: float | None = None, metric: str | None = None
) -> list[Group]:
    """Sum runs up, those that differ in their seed alone together.

    Args:
        paths: Run directories.
        target: Value of the metric whose cost is asked for.
        metric: Which one; by default the main metric, which must then be common.

    Raises:
        RunError: If one is no run, is given twice, was not evaluated, or they have no metric or
            no view in common.
    """
    runs = _courses(paths, metric)
    flat = [_flat(run.config) for run in runs]
    differing = sorted(
        key
        for key in {key for own in flat for key in own}
        if len({repr(f.get(key)) for f in flat}) > 1
    )
    told = [key for key in differing if not _NOT_COMPARED.match(key)]
    members: dict[str, list[int]] = {}
    for place, own in enumerate(flat):
        members.setdefault(repr([own.get(key) for key in told]), []).append(place)
    firsts = [flat[places[0]] for places in members.values()]
    shown = in_common(firsts, told)
    found = [{key: own.get(key) for key in shown} for own in firsts]
    labels = names(firsts, found)
    if not all(label and len(label.split(", ")) <= _MOST_TOLD for label in labels):
        labels = _run_names([runs[places[0]].path for places in members.values()])
    groups = []
    for places, settings, label in zip(members.values(), found, labels, strict=True):
        chosen = [runs[place] for place in places]
        groups.append(Group(label, chosen, settings, _figures(chosen, target)))
    return groups


def _run_names(paths: Sequence[Path]) -> list[str]:
    """Return the names of runs, or their paths where two have the same name."""
    found = [path.name for path in paths]
    return found if len(set(found)) == len(found) else [str(path) for path in paths]


def _figures(runs: Sequence[Course], target: float | None) -> dict[str, Spread | None]:
    found = {
        "last": Spread.of([run.last for run in runs]),
        "best": Spread.of([run.best for run in runs]),
    }
    for cost in TOTALS:
        found[cost] = Spread.of([run.spent(cost) for run in runs])
    if target is not None:
        for cost in COSTS:
            found[f"{cost} to target"] = Spread.of([run.to_reach(target, cost) for run in runs])
    return found


def _courses(paths: Sequence[Path], asked: str | None) -> list[Course]:
    """Read runs by a metric and a view that all of them have."""
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise RunError(f"{path} is given more than once; name each run once")
    histories = {path: History.of(RunDir.open(path)) for path in paths}
    metrics = {_metric(path, history, asked) for path, history in histories.items()}
    if len(metrics) > 1:
        raise RunError(
            f"the runs are judged by different metrics ({', '.join(sorted(metrics))}). Choose one"
            " that all have with --target METRIC=VALUE"
        )
    (metric,) = metrics
    for view in _COMMON_VIEWS:
        if all(history.evaluated(view, metric) for history in histories.values()):
            return [_course(path, own, metric, view) for path, own in histories.items()]
    raise RunError(
        f"the runs have no view of {metric} in common: some know it of the global model only,"
        " others of clients' own. Compare runs with the same evaluation.scope"
    )


def _metric(path: Path, history: History, asked: str | None) -> str:
    metric, known = asked or history.main_metric, history.metrics
    if metric is not None and metric in known:
        return metric
    have = f"it has {', '.join(known)}" if known else "nothing was evaluated"
    hint = did_you_mean(metric, known) if metric else ""
    raise RunError(f"{path} has no {metric or 'metric'} to compare by: {have}.{hint}")


def _course(path: Path, history: History, metric: str, view: str) -> Course:
    series = history.evaluated(view, metric)
    up, down = (history.totals("bytes", f"{way}_total") for way in ("up", "down"))
    costs = {
        "round": {record["round"]: float(record["round"]) for record in history.records},
        "virtual_time_s": _if_any(history.totals("virtual_time_s")),
        "bytes_total": {number: up[number] + down.get(number, 0.0) for number in up},
        "bytes_up": up,
        "bytes_down": down,
        "energy_total_j": _if_any(history.totals("energy_total_j")),
    }
    values = dict(zip(series.rounds, series.values, strict=True))
    config = read(path / CONFIG_FILE)
    if is_central(config):
        planned = max((int(record["rounds_planned"]) for record in history.records), default=1)
    else:
        planned = config["federation"]["rounds"]
    is_finished = history.last_round >= planned or any(r.get("ended") for r in history.records)
    return Course(path, config, metric, view, values, costs, is_finished)


def _if_any(totals: dict[int, float]) -> dict[int, float]:
    """Return what was spent; nothing is known where it is 0 from beginning to end."""
    return totals if max(totals.values(), default=0.0) > 0.0 else {}


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
