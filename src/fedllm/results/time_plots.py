"""Pictures of a run in virtual time: who did what and when, and what it was good for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedllm.results import style
from fedllm.results.history import History, is_share
from fedllm.results.timeline import OUTCOMES, UNDER_WAY, USED, Excerpt, Segment, Timeline

MAX_ROWS = 40
"""Clients in the timeline; the busiest are shown."""
_MAX_SEGMENTS = 4000
_MAX_LINES = 200
_NUM_TIMES = 240
"""Points of a curve over time."""
HOUR_S = 3600.0
PHASES = {"training": style.BLUE, "uploading": style.ORANGE}
_LATE = (
    (1, "sent, 1 version late", style.PURPLE),
    (3, "sent, 2 or 3 late", "#B0479B"),
    (math.inf, "sent, more late", "#7B2D8B"),
)
LOSS_MARKS = {
    "window": "|",
    "dropout": "x",
    "deadline": "D",
    "surplus": ".",
    "stale": "v",
    "rejected": "P",
    "unfinished": "s",
}


def time_unit(end_s: float) -> tuple[float, str]:
    """Return the unit that a span is best told in, in seconds, and its name."""
    for seconds, name in ((86400.0, "days"), (HOUR_S, "hours"), (60.0, "minutes")):
        if end_s >= 3 * seconds:
            return seconds, name
    return 1.0, "seconds"


@dataclass(frozen=True)
class Bars:
    """The stretches that look the same."""

    label: str
    color: str
    opacity: float
    height: float
    """Share of the height of a row."""
    segments: Sequence[Segment]


def bars(segments: Iterable[Segment]) -> list[Bars]:
    """Sort stretches by how they look: by phase, by how late the update was, and paler if lost."""
    looks: dict[tuple[str, str, float, float], list[Segment]]
    looks = {(label, color, 1.0, 0.6): [] for label, color in PHASES.items()}
    looks |= {(label, color, 1.0, 0.6): [] for _, label, color in _LATE}
    looks |= {(f"{label}, lost", color, 0.45, 0.3): [] for label, color in PHASES.items()}
    looks |= {(f"{label}, {UNDER_WAY}", color, 0.7, 0.6): [] for label, color in PHASES.items()}
    places = {look[0]: found for look, found in looks.items()}
    for segment in segments:
        places[_label(segment)].append(segment)
    return [Bars(*look, segments=found) for look, found in looks.items() if found]


def _label(segment: Segment) -> str:
    if segment.outcome == UNDER_WAY:
        return f"{segment.phase}, {UNDER_WAY}"
    if segment.outcome != USED:
        return f"{segment.phase}, lost"
    if segment.phase == "uploading" and segment.staleness:
        return next(label for most, label, _ in _LATE if segment.staleness <= most)
    return segment.phase


def thinned(times_s: Sequence[float], until_s: float, most: int) -> tuple[list[float], int]:
    """Return at most so many of the times up to one, and that each of how many is taken."""
    within = [time_s for time_s in times_s if time_s <= until_s]
    step = -(-len(within) // most) or 1
    return within[::step], step


def timeline(course: Timeline) -> Figure | None:
    """Draw windows, work and losses of the busiest clients, and the server's versions."""
    if not course.has_time:
        return None
    shown = course.excerpt(MAX_ROWS, _MAX_SEGMENTS)
    unit, name = time_unit(shown.until_s)
    rows = {client: place for place, client in enumerate(shown.clients)}
    figure = style.panels(size=(10.0, max(3.0, 0.2 * len(rows) + 1.6)))
    axes = figure.axes[0]
    for client, windows in shown.windows.items():
        spans = [(low / unit, (high - low) / unit) for low, high in windows]
        axes.broken_barh(spans, (rows[client] - 0.45, 0.9), color="#EFEFEF", zorder=1)
    handles: list[Any] = [Patch(color="#EFEFEF", label="window")]
    for kind in bars(shown.segments):
        look: dict[str, Any] = {"color": kind.color, "alpha": kind.opacity, "linewidth": 0}
        _draw_bars(axes, kind, rows, unit, look)
        handles.append(Patch(label=kind.label, **look))
    handles += _draw_losses(axes, shown, rows, unit)
    times_s, step = thinned(course.aggregations_s, shown.until_s, _MAX_LINES)
    for time_s in times_s:
        axes.axvline(time_s / unit, color=style.GREEN, linewidth=0.5, alpha=0.5, zorder=0)
    label = "new version" if step == 1 else f"one version in {step}"
    handles.append(Line2D([], [], color=style.GREEN, linewidth=1, label=label))
    axes.legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _finish_timeline(axes, shown, f"virtual {name}", shown.until_s / unit)
    return figure


def _draw_bars(
    axes: Any, kind: Bars, rows: Mapping[int, int], unit: float, look: Mapping[str, Any]
) -> None:
    spans: dict[int, list[tuple[float, float]]] = {}
    for segment in kind.segments:
        span = segment.start_s / unit, (segment.end_s - segment.start_s) / unit
        spans.setdefault(rows[segment.client], []).append(span)
    for row, own in spans.items():
        axes.broken_barh(own, (row - kind.height / 2, kind.height), zorder=2, **look)


def _draw_losses(axes: Any, shown: Excerpt, rows: Mapping[int, int], unit: float) -> list[Any]:
    """Mark the ends of lost jobs, a sign for each cause, and return the legend's handles."""
    handles = []
    for outcome, mark in LOSS_MARKS.items():
        lost = [row for row in shown.lost if row["outcome"] == outcome]
        if lost:
            places = [rows[row["client"]] for row in lost]
            times = [row["ended_s"] / unit for row in lost]
            label = f"lost: {outcome}"
            found = axes.scatter(
                times, places, marker=mark, s=22, color=style.RED, zorder=3, label=label
            )
            handles.append(found)
    return handles


def _finish_timeline(axes: Any, shown: Excerpt, xlabel: str, end: float) -> None:
    axes.set_title(f"Timeline of {shown.told}", loc="left")
    names = [str(client) for client in shown.clients]
    axes.set_yticks(range(len(names)), names, fontsize="x-small")
    axes.set_ylabel("client")
    axes.set_xlabel(xlabel)
    axes.set_xlim(0, end * 1.01)
    axes.invert_yaxis()
    axes.grid(visible=False)


def quality_for_cost(history: History, looks: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Draw the main metric of each view against virtual time and against energy.

    Args:
        history: All records.
        looks: Name of a view to how its line looks.
    """
    metric = history.main_metric
    known = {key: history.totals(key) for key in ("virtual_time_s", "energy_total_j")}
    known = {key: own for key, own in known.items() if max(own.values(), default=0.0) > 0.0}
    if metric is None or not known:
        return None
    figure = style.panels(1, len(known))
    labels: dict[str, Any] = {}
    for axes, (key, totals) in zip(figure.axes, known.items(), strict=True):
        unit, label = cost_unit(key, max(totals.values()))
        for view, look in looks.items():
            series = history.evaluated(view, metric)
            points = [
                (totals[x] / unit, y)
                for x, y in zip(series.rounds, series.values, strict=True)
                if x in totals
            ]
            if points:
                labels[view] = axes.plot(*zip(*points, strict=True), **look)[0]
        axes.set_xlabel(label)
        style.metric_axis(axes.yaxis, metric)
        if is_share(metric):
            axes.set_ylim(bottom=0)
    figure.suptitle("Quality for what it costs", x=0.01, ha="left")
    figure.legend(labels.values(), labels, loc="outside lower left", ncols=3, frameon=False)
    return figure


def cost_unit(key: str, end: float) -> tuple[float, str]:
    """Return the unit of virtual time or of energy, in seconds or joules, and the axis' label."""
    if key == "virtual_time_s":
        unit, name = time_unit(end)
        return unit, f"virtual {name}"
    unit, name = (1e3, "kJ") if end >= 3e3 else (1.0, "J")
    return unit, f"energy of clients ({name})"


def participation(course: Timeline, num_clients: int) -> Figure | None:
    """Draw how many jobs each client had and how many were used, the busiest first."""
    if not course.has_time:
        return None
    found = course.participation(num_clients)
    figure = style.panels(size=(6.8, 3.6))
    axes = figure.axes[0]
    edges = np.arange(len(found.clients) + 1)
    axes.stairs(found.jobs, edges, fill=True, color="#D9D9D9", label="jobs")
    axes.stairs(found.used, edges, fill=True, color=style.BLUE, label="used")
    axes.set_title(found.told, loc="left", fontsize="medium")
    axes.set_xlabel("clients that were sent for, by updates used")
    axes.set_ylabel("jobs")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, len(found.clients))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def utilisation(course: Timeline) -> Figure | None:
    """Draw who works over time, the share of online time that this is, and what came of it."""
    if not course.has_time:
        return None
    unit, name = time_unit(course.end_s)
    figure = style.panels(1, 3)
    counts, shares, right = figure.axes
    times, training, uploading = course.at_work(_NUM_TIMES)
    hours = [time_s / unit for time_s in times]
    colors = list(PHASES.values())
    counts.stackplot(hours, training, uploading, colors=colors, labels=list(PHASES))
    counts.set_ylabel("clients at work")
    counts.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    shares.plot(hours, working_shares(course, _NUM_TIMES), color=style.BLUE)
    shares.set_title(f"{course.working_share():.0%} of known online time", loc="left")
    shares.set_ylabel("share of clients online that work")
    shares.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    for axes in (counts, shares):
        axes.set_xlabel(f"virtual {name}")
        axes.set_xlim(0, course.end_s / unit)
        axes.set_ylim(bottom=0)
    spent = course.seconds_by_outcome()
    shown = [key for key in OUTCOMES if spent.get(key, 0.0) > 0.0]
    colors = [style.BLUE if key == USED else style.RED for key in shown]
    right.barh(shown, [spent[key] / unit for key in shown], color=colors)
    right.set_xlabel(f"client-{name} of work")
    right.invert_yaxis()
    total = sum(spent.values())
    share = spent.get(USED, 0.0) / total if total else 0.0
    right.set_title(f"{share:.0%} of the work was used", loc="left")
    return figure


def working_shares(course: Timeline, steps: int) -> list[float]:
    """Return the share of the clients known to be there that work, over time; NaN where none is."""
    _, training, uploading = course.at_work(steps)
    online = course.online(steps)
    return [
        min((a + b) / there, 1.0) if there > 1e-9 else math.nan
        for a, b, there in zip(training, uploading, online, strict=True)
    ]


def staleness(course: Timeline) -> Figure | None:
    """Draw how late updates were."""
    late = course.staleness
    if max(late, default=0) == 0:
        return None
    mean = sum(value * count for value, count in late.items()) / sum(late.values())
    figure = style.panels(size=(5.4, 3.4))
    axes = figure.axes[0]
    axes.bar(list(late), list(late.values()), color=style.BLUE)
    axes.set_title(f"How late updates were: {mean:.1f} versions on average", loc="left")
    axes.set_xlabel("versions made meanwhile")
    axes.set_ylabel("updates")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
