"""The figures of a report, drawn by plotly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plotly import graph_objects as go

from fedllm.results import style
from fedllm.results.history import VIEWS, History
from fedllm.results.time_plots import MAX_ROWS, PHASES, time_unit
from fedllm.results.timeline import OUTCOMES, USED, Timeline, gini

_VIEW_COLORS = dict(zip(VIEWS, style.PALETTE, strict=False))


def quality(history: History, against: str) -> go.Figure | None:
    """Draw the main metric of each view against rounds, virtual time, bytes or energy."""
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
            xs, ys, rounds = zip(*known, strict=True)
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
    if against == "virtual_time_s":
        unit, name = time_unit(max(totals.values(), default=0.0))
        return unit, f"virtual {name}", totals
    return 1e3, "energy of clients (kJ)", totals


def gantt(course: Timeline) -> go.Figure | None:
    """Draw the work of the busiest clients as bars one can zoom into."""
    if not course.has_time:
        return None
    unit, name = time_unit(course.end_s)
    clients = course.busiest(MAX_ROWS)
    rows = {row["job"]: row for row in course.ledger}
    figure = go.Figure()
    windows = [(c, low, high) for c, own in course.windows(clients).items() for low, high in own]
    figure.add_bar(
        base=[low / unit for _, low, _ in windows],
        x=[(high - low) / unit for _, low, high in windows],
        y=[str(client) for client, _, _ in windows],
        orientation="h", name="window", marker={"color": "#EEEEEE"}, width=0.95, hoverinfo="skip",
    )  # fmt: skip
    segments = course.segments(clients)
    for phase, color in PHASES.items():
        for is_used in (True, False):
            own = [s for s in segments if s.phase == phase and (s.outcome == USED) == is_used]
            figure.add_bar(
                base=[s.start_s / unit for s in own],
                x=[(s.end_s - s.start_s) / unit for s in own],
                y=[str(s.client) for s in own],
                customdata=[_told(rows.get(s.job, {}), s.job) for s in own],
                hovertemplate="%{customdata}<extra></extra>",
                orientation="h", name=phase if is_used else f"{phase}, lost",
                marker={"color": color, "opacity": 1.0 if is_used else 0.4},
                width=0.6 if is_used else 0.3,
            )  # fmt: skip
    figure.update_layout(barmode="overlay", height=220 + 18 * len(clients))
    order = [str(client) for client in clients]
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=order[::-1])
    return _laid_out(figure, f"virtual {name}", "client")


def _told(row: Mapping[str, Any], job: int) -> str:
    late = row.get("staleness")
    lines = [
        f"client {row.get('client', '?')}, job {job}",
        OUTCOMES.get(str(row.get("outcome")), "goes on"),
        f"{row.get('steps', 0)} steps, {row.get('energy_j', 0.0):.3g} J",
        f"{row.get('down_bytes', 0) / 1e6:.3g} MB down, {row.get('up_bytes', 0) / 1e6:.3g} MB up",
    ]
    return "<br>".join([*lines, *([] if late is None else [f"{late} versions late"])])


def participation(course: Timeline, num_clients: int) -> go.Figure | None:
    """Draw jobs and used updates of each client that was sent for."""
    jobs = course.jobs_by_client()
    if not course.has_time:
        return None
    order = sorted(jobs, key=lambda client: (-jobs[client][1], -jobs[client][0], client))
    names = [f"client {client}" for client in order]
    figure = go.Figure()
    figure.add_bar(x=names, y=[jobs[c][0] for c in order], name="jobs", marker={"color": "#CCCCCC"})
    figure.add_bar(
        x=names, y=[jobs[c][1] for c in order], name="used", marker={"color": style.BLUE}
    )
    figure.update_layout(barmode="overlay")
    used = [jobs[c][1] for c in order] + [0] * (num_clients - len(order))
    never = sum(count == 0 for count in used)
    told = f"{never} of {num_clients} clients never contributed, Gini {gini(used):.2f}"
    return _laid_out(figure, told, "jobs")


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
    return _laid_out(figure, f"client-{name} of work", "")


def staleness(course: Timeline) -> go.Figure | None:
    """Draw how many versions were made while updates were on their way."""
    late = [row["staleness"] for row in course.ledger if row["staleness"] is not None]
    if not late or max(late) == 0:
        return None
    counts = [late.count(value) for value in range(max(late) + 1)]
    figure = go.Figure()
    figure.add_bar(x=list(range(max(late) + 1)), y=counts, marker={"color": style.BLUE})
    return _laid_out(figure, "versions late", "updates")


def _laid_out(figure: go.Figure, x: str, y: str) -> go.Figure:
    figure.update_layout(
        template="simple_white", margin={"l": 60, "r": 20, "t": 20, "b": 50},
        legend={"orientation": "h", "y": 1.08}, xaxis_title=x, yaxis_title=y,
    )  # fmt: skip
    return figure
