"""The figures of a report, drawn by plotly; colours that read on white and on black."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plotly import graph_objects as go

from fedllm.results import style
from fedllm.results.history import VIEWS, History
from fedllm.results.time_plots import (
    LOSS_MARKS,
    MAX_ROWS,
    Bars,
    bars,
    cost_unit,
    thinned,
    time_unit,
    working_shares,
)
from fedllm.results.timeline import OUTCOMES, UNDER_WAY, USED, Excerpt, Timeline

_VIEW_COLORS = dict(zip(VIEWS, style.PALETTE, strict=False))
_INK, _FAINT, _CLEAR = "#7a7a7a", "rgba(128,128,128,0.25)", "rgba(0,0,0,0)"
# the page stays small, however long the run was
_MAX_POINTS = 400
_MAX_SEGMENTS = 3000
_MAX_LINES = 400
_MAX_CLIENTS = 400
_NUM_TIMES = 240


def quality(history: History, against: str) -> go.Figure | None:
    """Draw the main metric of each view against rounds, virtual time, bytes or energy.

    Of more than 400 evaluations some are left out evenly, never the last.
    """
    metric = history.main_metric
    if metric is None:
        return None
    unit, name, totals = _axis(history, against)
    if totals is not None and max(totals.values(), default=0.0) <= 0.0:
        return None
    figure = go.Figure()
    for view, color in _VIEW_COLORS.items():
        series = history.evaluated(view, metric)
        known = [
            ((totals[x] / unit if totals is not None else x), y, x)
            for x, y in zip(series.rounds, series.values, strict=True)
            if totals is None or x in totals
        ]
        if known:
            step = -(-len(known) // _MAX_POINTS)
            xs, ys, rounds = zip(*known[::-1][::step][::-1], strict=True)
            told = f"{view}<br>round %{{customdata}}<br>{metric} %{{y:.4g}}<extra></extra>"
            figure.add_scatter(
                x=xs, y=ys, customdata=rounds, name=view, mode="lines+markers",
                line={"color": color}, hovertemplate=told,
            )  # fmt: skip
    if not figure.data:
        return None
    return _laid_out(figure, name, style.metric_label(metric))


def _axis(history: History, against: str) -> tuple[float, str, dict[int, float] | None]:
    if against == "round":
        return 1.0, "round", None
    if against == "bytes":
        up, down = (history.totals("bytes", f"{way}_total") for way in ("up", "down"))
        return 1e6, "MB up and down", {x: up[x] + down.get(x, 0.0) for x in up}
    totals = history.totals(against)
    return *cost_unit(against, max(totals.values(), default=0.0)), totals


def gantt(course: Timeline) -> go.Figure | None:
    """Draw windows, work, losses and versions of the busiest clients, to zoom into."""
    if not course.has_time:
        return None
    shown = course.excerpt(MAX_ROWS, _MAX_SEGMENTS)
    unit, name = time_unit(shown.until_s)
    jobs = {segment.job for segment in shown.segments}
    jobs |= {row["job"] for row in shown.lost}
    rows = {row["job"]: row for row in course.ledger if row["job"] in jobs}
    figure = go.Figure()
    windows = [(c, low, high) for c, own in shown.windows.items() for low, high in own]
    figure.add_bar(
        base=[_place(low, unit) for _, low, _ in windows[:_MAX_SEGMENTS]],
        x=[_place(high - low, unit) for _, low, high in windows[:_MAX_SEGMENTS]],
        y=[str(client) for client, _, _ in windows[:_MAX_SEGMENTS]],
        orientation="h", name="window", marker={"color": _FAINT}, width=0.95, hoverinfo="skip",
    )  # fmt: skip
    for kind in bars(shown.segments):
        _add_bars(figure, kind, rows, unit)
    _add_losses(figure, shown, unit)
    _add_versions(figure, course, shown, unit)
    figure.update_layout(barmode="overlay")
    order = [str(client) for client in shown.clients]
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=order[::-1])
    label = f"virtual {name}, {shown.told}"
    return _laid_out(figure, label, "client", height=240 + 18 * len(order))


def _place(time_s: float, unit: float) -> float:
    """Return a time in the unit of its axis, short enough to be written a thousand times."""
    return round(time_s / unit, 5)


def _add_bars(figure: go.Figure, kind: Bars, rows: Mapping[int, Any], unit: float) -> None:
    figure.add_bar(
        base=[_place(s.start_s, unit) for s in kind.segments],
        x=[_place(s.end_s - s.start_s, unit) for s in kind.segments],
        y=[str(s.client) for s in kind.segments],
        text=[_told(rows.get(s.job), s.client, s.job) for s in kind.segments],
        hovertemplate="%{text}<extra></extra>", textposition="none",
        orientation="h", name=kind.label, width=kind.height,
        marker={"color": kind.color, "opacity": kind.opacity, "line": {"width": 0}},
    )  # fmt: skip


def _add_losses(figure: go.Figure, shown: Excerpt, unit: float) -> None:
    symbols = dict(zip(LOSS_MARKS, ("line-ns-open", "x", "diamond", "circle", "triangle-down",
                                    "cross", "square"), strict=True))  # fmt: skip
    for outcome, symbol in symbols.items():
        own = [row for row in shown.lost if row["outcome"] == outcome]
        if own:
            figure.add_scatter(
                x=[_place(row["ended_s"], unit) for row in own],
                y=[str(row["client"]) for row in own], mode="markers", name=f"lost: {outcome}",
                text=[_told(row, row["client"], row["job"]) for row in own],
                hovertemplate="%{text}<extra></extra>",
                marker={"symbol": symbol, "color": style.RED, "size": 7},
            )  # fmt: skip


def _add_versions(figure: go.Figure, course: Timeline, shown: Excerpt, unit: float) -> None:
    """Draw a line for each version, or for some of many, all as one trace."""
    times_s, step = thinned(course.aggregations_s, shown.until_s, _MAX_LINES)
    ends = [str(shown.clients[-1]), str(shown.clients[0]), None]
    figure.add_scatter(
        x=[x for time_s in times_s for x in (*[_place(time_s, unit)] * 2, None)],
        y=ends * len(times_s), mode="lines", hoverinfo="skip",
        line={"color": style.GREEN, "width": 0.7}, opacity=0.6,
        name="new version" if step == 1 else f"one version in {step}",
    )  # fmt: skip


def _told(row: Mapping[str, Any] | None, client: int, job: int) -> str:
    if row is None:
        return f"client {client}, job {job}<br>{UNDER_WAY}"
    late = row.get("staleness")
    sent, received = row["up_bytes"] / 1e6, row["down_bytes"] / 1e6
    outcome = str(row["outcome"])
    lines = [
        f"client {client}, job {job}: {outcome}",
        OUTCOMES.get(outcome, ""),
        f"{row['steps']} steps, {row['energy_j']:.3g} J",
        f"{received:.3g} MB down, {sent:.3g} MB up",
    ]
    return "<br>".join([*lines, *([] if late is None else [f"{late} versions late"])])


def participation(course: Timeline, num_clients: int) -> go.Figure | None:
    """Draw jobs and used updates of each client that was sent for, or of some of many."""
    if not course.has_time:
        return None
    found = course.participation(num_clients)
    step = -(-len(found.clients) // _MAX_CLIENTS)
    names = [f"client {client}" for client in found.clients[::step]]
    figure = go.Figure()
    figure.add_bar(x=names, y=found.jobs[::step], name="jobs", marker={"color": _FAINT})
    figure.add_bar(x=names, y=found.used[::step], name="used", marker={"color": style.BLUE})
    figure.update_layout(barmode="overlay", bargap=0)
    few = f"; one client in {step} is shown" if step > 1 else ""
    figure.update_xaxes(showticklabels=len(names) <= MAX_ROWS)
    return _laid_out(figure, found.told + few, "jobs")


def utilisation(course: Timeline) -> go.Figure | None:
    """Draw the share of the clients known to be there that work, over time."""
    if not course.has_time:
        return None
    unit, name = time_unit(course.end_s)
    figure = go.Figure()
    times, training, uploading = course.at_work(_NUM_TIMES)
    hours = [_place(time_s, unit) for time_s in times]
    for label, counts, color in (
        ("training", training, style.BLUE),
        ("uploading", uploading, style.ORANGE),
    ):
        figure.add_scatter(
            x=hours, y=_rounded(counts), stackgroup="work", name=label,
            line={"color": color, "width": 0},
        )  # fmt: skip
    figure.add_scatter(
        x=hours, y=_rounded(working_shares(course, _NUM_TIMES)), yaxis="y2",
        name="share of those online", line={"color": style.PURPLE},
    )  # fmt: skip
    axis = {"overlaying": "y", "side": "right", "tickformat": ".0%", "rangemode": "tozero"}
    figure.update_layout(yaxis2={**axis, "showgrid": False, "color": _INK})
    told = f"virtual {name}; clients work for {course.working_share():.0%} of known online time"
    return _laid_out(figure, told, "clients at work")


def _rounded(values: Sequence[float]) -> list[float | None]:
    """Shorten numbers; what is not known is a gap."""
    return [None if value != value else round(value, 4) for value in values]


def outcomes(course: Timeline) -> go.Figure | None:
    """Draw the client-seconds of work by what came of them."""
    if not course.has_time:
        return None
    unit, name = time_unit(course.end_s)
    spent = course.seconds_by_outcome()
    shown = [key for key in OUTCOMES if key in spent]
    figure = go.Figure()
    figure.add_bar(
        x=[spent[key] / unit for key in shown], y=shown, orientation="h",
        marker={"color": [style.BLUE if key == USED else style.RED for key in shown]},
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    return _laid_out(figure, f"client-{name} of work", "")


def staleness(course: Timeline) -> go.Figure | None:
    """Draw how many versions were made while updates were on their way."""
    late = course.staleness
    if max(late, default=0) == 0:
        return None
    figure = go.Figure()
    figure.add_bar(x=list(late), y=list(late.values()), marker={"color": style.BLUE})
    return _laid_out(figure, "versions late", "updates")


def _laid_out(figure: go.Figure, x: str, y: str, height: int = 340) -> go.Figure:
    figure.update_layout(
        template="none", margin={"l": 60, "r": 50, "t": 30, "b": 50}, height=height,
        paper_bgcolor=_CLEAR, plot_bgcolor=_CLEAR, font={"color": _INK},
        legend={"orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom"},
        modebar={"bgcolor": _CLEAR, "color": _INK, "activecolor": style.BLUE},
        hoverlabel={"font": {"color": "#fff"}, "bgcolor": "#333"},
    )  # fmt: skip
    look = {"gridcolor": _FAINT, "linecolor": _INK, "zeroline": False, "automargin": True}
    figure.update_xaxes(title_text=x, **look)
    figure.update_yaxes(title_text=y, selector={"overlaying": None}, **look)
    return figure
