"""Pictures of a run in virtual time: who did what and when, and what it was good for."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fedllm.results import style
from fedllm.results.history import History, is_share
from fedllm.results.timeline import OUTCOMES, USED, Timeline, gini

MAX_ROWS = 40
"""Clients in the timeline; the busiest are shown."""
_MAX_SEGMENTS = 4000
HOUR_S = 3600.0
PHASES = {"training": style.BLUE, "uploading": style.ORANGE}
LOSS_MARKS = {"window": "|", "dropout": "x", "deadline": "D", "surplus": ".", "stale": "v"}


def time_unit(end_s: float) -> tuple[float, str]:
    """Return the unit that a span is best told in, in seconds, and its name."""
    for seconds, name in ((86400.0, "days"), (HOUR_S, "hours"), (60.0, "minutes")):
        if end_s >= 3 * seconds:
            return seconds, name
    return 1.0, "seconds"


def timeline(course: Timeline) -> Figure | None:
    """Draw windows, work and losses of the busiest clients, and the server's versions."""
    if not course.has_time:
        return None
    unit, name = time_unit(course.end_s)
    clients = course.busiest(MAX_ROWS)
    rows = {client: place for place, client in enumerate(clients)}
    figure = style.panels(size=(10.0, max(3.0, 0.2 * len(clients) + 1.6)))
    axes = figure.axes[0]
    for client, windows in course.windows(clients).items():
        bars = [(low / unit, (high - low) / unit) for low, high in windows]
        axes.broken_barh(bars, (rows[client] - 0.45, 0.9), color="#EFEFEF", zorder=1)
    for segment in course.segments(clients)[:_MAX_SEGMENTS]:
        bar = (segment.start_s / unit, (segment.end_s - segment.start_s) / unit)
        height = 0.3 if segment.outcome != USED else 0.6
        alpha = 1.0 if segment.outcome == USED else 0.45
        look: dict[str, Any] = {"color": PHASES[segment.phase], "alpha": alpha}
        axes.broken_barh([bar], (rows[segment.client] - height / 2, height), zorder=2, **look)
    for outcome, mark in LOSS_MARKS.items():
        lost = [r for r in course.ledger if r["outcome"] == outcome and r["client"] in rows]
        if lost:
            places = [rows[row["client"]] for row in lost]
            times = [row["ended_s"] / unit for row in lost]
            axes.scatter(times, places, marker=mark, s=22, color=style.RED, zorder=3)
    for time_s in course.aggregations_s[:_MAX_SEGMENTS]:
        axes.axvline(time_s / unit, color=style.GREEN, linewidth=0.5, alpha=0.5, zorder=0)
    _finish_timeline(axes, course, clients, name)
    return figure


def _finish_timeline(axes: Any, course: Timeline, clients: list[int], unit: str) -> None:
    everyone = len(course.jobs_by_client())
    shown = f"the {len(clients)} busiest of " if everyone > len(clients) else ""
    axes.set_title(f"What {shown}{everyone} clients did", loc="left")
    axes.set_yticks(range(len(clients)), [str(client) for client in clients], fontsize="x-small")
    axes.set_ylabel("client")
    axes.set_xlabel(f"virtual {unit}")
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.grid(visible=False)
    handles: list[Any] = [Patch(color="#EFEFEF", label="window")]
    handles += [Patch(color=color, label=phase) for phase, color in PHASES.items()]
    handles.append(Line2D([], [], color=style.GREEN, linewidth=1, label="new version"))
    handles += [
        Line2D([], [], color=style.RED, marker=mark, linestyle="", label=f"lost: {outcome}")
        for outcome, mark in LOSS_MARKS.items()
        if outcome in course.outcomes
    ]
    axes.legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def quality_for_cost(history: History) -> Figure | None:
    """Draw the main metric against virtual time and against energy."""
    metric = history.main_metric
    known = {key: history.totals(key) for key in ("virtual_time_s", "energy_total_j")}
    known = {key: own for key, own in known.items() if max(own.values(), default=0.0) > 0.0}
    if metric is None or not known:
        return None
    figure = style.panels(1, len(known))
    for axes, (key, totals) in zip(figure.axes, known.items(), strict=True):
        end = max(totals.values())
        is_time = key == "virtual_time_s"
        unit, name = time_unit(end) if is_time else (1e3, "kJ") if end >= 3e3 else (1.0, "J")
        for view, color in (("global", style.BLUE), ("personal mean", style.GREEN)):
            series = history.evaluated(view, metric)
            points = [
                (totals[x] / unit, y)
                for x, y in zip(series.rounds, series.values, strict=True)
                if x in totals
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=color, label=view)
        axes.set_xlabel(f"virtual {name}" if is_time else f"energy of clients ({name})")
        style.metric_axis(axes.yaxis, metric)
        if is_share(metric):
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    figure.suptitle("Quality for what it costs", x=0.01, ha="left")
    return figure


def participation(course: Timeline, num_clients: int) -> Figure | None:
    """Draw how many jobs each client had and how many were used, the busiest first."""
    jobs = course.jobs_by_client()
    if not jobs or not course.has_time:
        return None
    order = sorted(jobs, key=lambda client: (-jobs[client][1], -jobs[client][0], client))
    figure = style.panels(size=(6.8, 3.6))
    axes = figure.axes[0]
    places = np.arange(len(order))
    axes.bar(places, [jobs[c][0] for c in order], color="#D9D9D9", width=1.0, label="jobs")
    axes.bar(places, [jobs[c][1] for c in order], color=style.BLUE, width=1.0, label="used")
    used = [jobs[c][1] for c in order] + [0] * (num_clients - len(order))
    never = num_clients - sum(count > 0 for count in used)
    axes.set_title(
        f"Who contributed: {never} of {num_clients} clients never, Gini {gini(used):.2f}",
        loc="left",
    )
    axes.set_xlabel("clients that were sent for, by updates used")
    axes.set_ylabel("jobs")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def utilisation(course: Timeline) -> Figure | None:
    """Draw how many clients work over time, and what their work came to."""
    if not course.has_time:
        return None
    unit, name = time_unit(course.end_s)
    figure = style.panels(1, 2)
    left, right = figure.axes
    times, training, uploading = course.at_work(240)
    left.stackplot(
        [time_s / unit for time_s in times],
        training,
        uploading,
        colors=list(PHASES.values()),
        labels=list(PHASES),
    )
    left.set_xlabel(f"virtual {name}")
    left.set_ylabel("clients at work")
    left.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
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


def staleness(course: Timeline) -> Figure | None:
    """Draw how late updates were."""
    late = [row["staleness"] for row in course.ledger if row["staleness"] is not None]
    if not late or max(late) == 0:
        return None
    figure = style.panels(size=(5.4, 3.4))
    axes = figure.axes[0]
    axes.bar(*np.unique(late, return_counts=True), color=style.BLUE)
    axes.set_title(f"How late updates were: {np.mean(late):.1f} versions on average", loc="left")
    axes.set_xlabel("versions made meanwhile")
    axes.set_ylabel("updates")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
