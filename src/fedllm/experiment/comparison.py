"""The table of a matrix: mean and deviation over seeds of what its runs ended with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedllm.experiment.matrix import Cell
from fedllm.results import History, RunDir, overview, strict_json
from fedllm.results.storage import write_text


@dataclass(frozen=True)
class Figure:
    """A quantity over seeds."""

    mean: float
    deviation: float
    """Sample standard deviation; 0 for one seed."""

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Figure | None:
        """Sum up the known values; None if there are none."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            return None
        spread = statistics.stdev(known) if len(known) > 1 else 0.0
        return cls(statistics.fmean(known), spread)


@dataclass(frozen=True)
class Line:
    """One algorithm in one setting."""

    setting: str
    label: str
    metric: str
    seeds: int
    """How many finished runs are behind the figures."""
    overall: Figure | None
    """The main metric of the global view, on all test rows."""
    own: Figure | None
    """The mean over clients on their own test rows: of their own views, if they have some."""
    worst: Figure | None
    """The same for the worst tenth of the clients (at least one)."""
    up_bytes: Figure | None
    """Of the whole run."""
    down_bytes: Figure | None
    agg_error: Figure | None
    """Mean over rounds."""
    server_s: Figure | None
    """Seconds of aggregation a round."""


def lines(found: Sequence[Cell]) -> list[Line]:
    """Return a line for each setting and label, from the run directories that are there."""
    grouped: dict[tuple[str, str], list[Cell]] = {}
    for cell in found:
        grouped.setdefault((cell.setting, cell.label), []).append(cell)
    made = []
    for (setting, label), members in grouped.items():
        runs = [_outcome(RunDir.open(c.config.run_dir)) for c in members if _is_finished(c)]
        made.append(_line(setting, label, [run for run in runs if run is not None]))
    return made


def _is_finished(cell: Cell) -> bool:
    path = cell.config.run_dir
    return path.exists() and overview(RunDir.open(path)).is_finished


def _outcome(run: RunDir) -> dict[str, Any] | None:
    """Return what one run ended with; None if it has not been evaluated."""
    history = History.of(run)
    last = next((r for r in reversed(history.records) if r.get("eval")), None)
    metric = history.main_metric
    if last is None or metric is None:
        return None
    evaluation = last["eval"]
    own = evaluation.get("personal") or evaluation.get("clients") or {}
    timing = [row["aggregate"] for row in run.read("timing") if "aggregate" in row]
    errors = [r["agg_error"] for r in history.records if r.get("agg_error") is not None]
    return {
        "metric": metric,
        "overall": (evaluation.get("global") or {}).get(metric),
        "own": (own.get("mean") or {}).get(metric),
        "worst": (own.get("worst_10") or {}).get(metric),
        "up_bytes": last["bytes"]["up_total"],
        "down_bytes": last["bytes"]["down_total"],
        "agg_error": statistics.fmean(errors) if errors else None,
        "server_s": statistics.fmean(timing) if timing else None,
    }


def _line(setting: str, label: str, runs: Sequence[Mapping[str, Any]]) -> Line:
    keys = ("overall", "own", "worst", "up_bytes", "down_bytes", "agg_error", "server_s")
    figures = {key: Figure.of(run[key] for run in runs) for key in keys}
    metric = runs[0]["metric"] if runs else ""
    return Line(setting=setting, label=label, metric=metric, seeds=len(runs), **figures)


def markdown(table: Sequence[Line]) -> str:
    """Return the table as Markdown, a part for each setting."""
    text = []
    for setting in dict.fromkeys(line.setting for line in table):
        own = [line for line in table if line.setting == setting]
        metric = next((line.metric for line in own if line.metric), "")
        text += [
            f"### {setting}",
            "",
            f"| algorithm | {metric}, global | on own data | worst client | up MB | down MB"
            " | agg_error | server ms a round | seeds |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *(_markdown_row(line) for line in own),
            "",
        ]
    return "\n".join(text)


def _markdown_row(line: Line) -> str:
    cells = [
        line.label,
        _percent(line.overall),
        _percent(line.own),
        _percent(line.worst),
        _scaled(line.up_bytes, 1e-6),
        _scaled(line.down_bytes, 1e-6),
        "-" if line.agg_error is None else f"{line.agg_error.mean:.2g}",
        _scaled(line.server_s, 1e3),
        str(line.seeds),
    ]
    return f"| {' | '.join(cells)} |"


def _percent(figure: Figure | None) -> str:
    """Return a share in per cent with its deviation; what is no share, as it is."""
    if figure is None:
        return "-"
    if 0.0 <= figure.mean <= 1.0:
        return f"{100 * figure.mean:.1f} ± {100 * figure.deviation:.1f}"
    return f"{figure.mean:.3f} ± {figure.deviation:.3f}"


def _scaled(figure: Figure | None, factor: float) -> str:
    return "-" if figure is None else f"{figure.mean * factor:.1f}"


def write(table: Sequence[Line], folder: Path) -> list[Path]:
    """Write `table.md` and `table.json` into a folder, and return their paths."""
    rows = strict_json([asdict(line) for line in table]) + "\n"
    paths = [folder / "table.md", folder / "table.json"]
    for path, text in zip(paths, (markdown(table), rows), strict=True):
        write_text(path, text)
    return paths
