"""Pictures of a run, made from its directory alone, while it runs or long after."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedllm.results import style, time_plots
from fedllm.results.history import History, is_share
from fedllm.results.run_dir import RunDir
from fedllm.results.storage import explained
from fedllm.results.timeline import Timeline, num_clients_of

_VIEW_LOOKS: Mapping[str, dict[str, Any]] = {
    "global": {"color": style.BLUE, "marker": "o"},
    "client mean": {"color": style.SKY, "marker": "s", "linestyle": "--"},
    "worst 10 % of clients": {"color": style.RED, "marker": "v"},
    "personal mean": {"color": style.GREEN, "marker": "D"},
    "personal, worst 10 %": {"color": style.ORANGE, "marker": "^"},
}
_MAX_CLIENT_NAMES = 40
"""More clients than this are not named one by one."""
_MEGABYTE = 1e6


def plot_run(run: RunDir) -> list[Path]:
    """Draw `plots/*.png` anew; a figure for which there is no data is left out.

    Returns:
        The files written, in the order in which they are best looked at.

    Raises:
        RunError: If they cannot be written.
    """
    history = History.of(run)
    source = run.path / "heterogeneity.json"
    split = json.loads(source.read_text(encoding="utf-8")) if source.exists() else None
    course, num_clients = Timeline.of(run), num_clients_of(run)
    drawings: dict[str, Callable[[], Figure | None]] = {
        "quality": lambda: quality(history),
        "training_loss": lambda: training_loss(history),
        "clients": lambda: clients(history),
        "bytes": lambda: traffic(history),
        "agg_error": lambda: aggregation_error(history),
        "heterogeneity": lambda: heterogeneity(split) if split else None,
        "timeline": lambda: time_plots.timeline(course),
        "quality_for_cost": lambda: time_plots.quality_for_cost(history, _VIEW_LOOKS),
        "participation": lambda: time_plots.participation(course, num_clients),
        "utilisation": lambda: time_plots.utilisation(course),
        "staleness": lambda: time_plots.staleness(course),
    }
    written = []
    for name, draw in drawings.items():
        figure = draw()
        if figure is not None:
            path = run.path / "plots" / f"{name}.png"
            with explained(path, "The run itself is untouched."):
                written.append(style.save(figure, path))
    return written


def training_loss(history: History) -> Figure | None:
    """Draw the mean training loss of each round, and how far the middle 80 % of clients spread."""
    mean = history.series("train", "loss")
    if not mean:
        return None
    figure = style.panels(size=(6.4, 3.8))
    axes = figure.axes[0]
    spread = history.client_losses()
    if spread:
        low, high = np.array([np.percentile(losses, [10, 90]) for _, losses in spread]).T
        rounds = [number for number, _ in spread]
        label = "10th to 90th percentile of clients"
        axes.fill_between(rounds, low, high, color=style.BLUE, alpha=0.18, linewidth=0, label=label)
    axes.plot(mean.rounds, mean.values, color=style.BLUE, **_dots(len(mean.rounds)), label="mean")
    axes.set_title("Training loss by round", loc="left")
    style.metric_axis(axes.yaxis, "loss")
    style.round_axis(axes)
    axes.legend(frameon=False)
    return figure


def quality(history: History) -> Figure | None:
    """Draw every held-out metric over rounds, a panel each, a line for each view."""
    if not history.metrics:
        return None
    columns = 2 if len(history.metrics) in (2, 4) else min(len(history.metrics), 3)
    rows = -(-len(history.metrics) // columns)
    figure = style.panels(rows, columns)
    labels: dict[str, Any] = {}
    for axes, metric in zip(figure.axes, history.metrics, strict=False):
        for view, look in _VIEW_LOOKS.items():
            series = history.evaluated(view, metric)
            if series:
                dots = {**_dots(len(series.rounds)), **look}
                labels[view] = axes.plot(series.rounds, series.values, **dots)[0]
        style.metric_axis(axes.yaxis, metric)
        style.round_axis(axes)
        if is_share(metric):
            axes.set_ylim(bottom=0)
        if metric == history.main_metric:
            axes.set_title("main metric", loc="left", fontsize="medium")
    for axes in figure.axes[len(history.metrics) :]:
        axes.set_visible(False)
    figure.suptitle("Held-out quality by round", x=0.01, ha="left")
    figure.legend(
        labels.values(), labels, loc="outside lower left", ncols=len(labels), frameon=False
    )
    return figure


def clients(history: History) -> Figure | None:
    """Draw the main metric of every client at its last evaluation, the worst client first."""
    metric = history.main_metric
    if metric is None:
        return None
    common, personal = (history.by_client(part, metric) for part in ("clients", "personal"))
    ranked = common or personal
    if not ranked:
        return None
    order = sorted(ranked, key=ranked.__getitem__, reverse=not is_share(metric))
    figure = style.panels(size=(min(max(5.5, 0.3 * len(order) + 2), 12), 3.8))
    axes = figure.axes[0]
    both = [i for i, cid in enumerate(order) if cid in common and cid in personal]
    before, after = ([part[order[i]] for i in both] for part in (common, personal))
    axes.vlines(both, before, after, color="#C8C8C8", linewidth=2, zorder=1)
    _client_dots(axes, common, order, {"label": "global model", "color": style.BLUE})
    look = {"label": "personal model", "color": style.GREEN, "marker": "D"}
    _client_dots(axes, personal, order, look)
    axes.set_title("Each client's own test rows, at the last evaluation", loc="left")
    style.metric_axis(axes.yaxis, metric)
    if is_share(metric):
        axes.set_ylim(-0.03, 1.03)
    axes.grid(visible=False, axis="x")
    _name_clients(axes.xaxis, order, "clients, from worst to best")
    axes.legend(title="dashed: mean", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _client_dots(
    axes: Any, values: Mapping[int, float], order: Sequence[int], look: Mapping[str, Any]
) -> None:
    """Draw a dot for each client that has a value, and a line at their mean."""
    places = [i for i, cid in enumerate(order) if cid in values]
    if places:
        heights = [values[order[i]] for i in places]
        size = 28 if len(order) <= _MAX_CLIENT_NAMES else 6
        axes.scatter(places, heights, s=size, zorder=2, **look)
        axes.axhline(float(np.mean(heights)), color=look["color"], linewidth=1, linestyle="--")


def traffic(history: History) -> Figure | None:
    """Draw the bytes sent so far, and what quality they have bought."""
    up, down = (history.series("bytes", f"{way}_total") for way in ("up", "down"))
    if not up or not down:
        return None
    metric = history.main_metric
    figure = style.panels(1, 2 if metric else 1)
    sent, *bought = figure.axes
    for label, series, color in (
        ("down to clients", down, style.SKY),
        ("up to the server", up, style.BLUE),
    ):
        megabytes = np.array(series.values) / _MEGABYTE
        sent.plot(series.rounds, megabytes, color=color, **_dots(len(series.rounds)), label=label)
    sent.set_title("Traffic so far", loc="left")
    sent.set_ylabel("sent in all (MB)")
    sent.set_ylim(bottom=0)
    style.round_axis(sent)
    sent.legend(frameon=False)
    if metric:
        total = dict(zip(up.rounds, up.values, strict=True))
        for number, size in zip(down.rounds, down.values, strict=True):
            total[number] = total.get(number, 0) + size
        _quality_for_bytes(bought[0], history, metric, total)
    return figure


def _quality_for_bytes(
    axes: Any, history: History, metric: str, total: Mapping[int, float]
) -> None:
    for view in ("global", "personal mean"):
        series = history.evaluated(view, metric)
        points = [
            (total[x] / _MEGABYTE, y)
            for x, y in zip(series.rounds, series.values, strict=True)
            if x in total
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                **{**_dots(len(points)), **_VIEW_LOOKS[view]},
                label=view,
            )
    axes.set_title("Quality for traffic", loc="left")
    axes.set_xlabel("sent up and down (MB)")
    style.metric_axis(axes.yaxis, metric)
    if is_share(metric):
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def aggregation_error(history: History) -> Figure | None:
    """Draw how far each round's aggregate is from the mean of what the clients trained."""
    found = history.series("agg_error")
    points = [(x, y) for x, y in zip(found.rounds, found.values, strict=True) if y > 0]
    if not points:
        return None
    figure = style.panels(size=(6.4, 3.8))
    axes = figure.axes[0]
    axes.plot(*zip(*points, strict=True), color=style.BLUE, **_dots(len(points)))
    axes.set_yscale("log")
    axes.set_title("Distance of the aggregate from the mean update", loc="left")
    axes.set_ylabel("aggregation error (Frobenius norm)")
    style.round_axis(axes)
    return figure


def heterogeneity(split: Mapping[str, Any]) -> Figure | None:
    """Draw which client holds how many training rows of which group."""
    counts = np.asarray(split["counts"], dtype=float)
    groups = [str(group) for group in split["group_names"]]
    if counts.size == 0:
        return None
    if len(groups) <= len(style.PALETTE) and len(counts) <= _MAX_CLIENT_NAMES:
        return _stacked(counts, groups)
    return _heat(counts, groups)


def _stacked(counts: np.ndarray, groups: list[str]) -> Figure:
    figure = style.panels(size=(7.2, max(2.4, 0.26 * len(counts) + 1.2)))
    axes = figure.axes[0]
    places, left = np.arange(len(counts)), np.zeros(len(counts))
    for column, (group, color) in enumerate(zip(groups, style.PALETTE, strict=False)):
        axes.barh(places, counts[:, column], left=left, color=color, label=group, height=0.8)
        left = left + counts[:, column]
    axes.set_title("What each client trains on", loc="left")
    axes.set_xlabel("training rows")
    axes.grid(visible=False, axis="y")
    _name_clients(axes.yaxis, range(len(counts)), "client")
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _heat(counts: np.ndarray, groups: list[str]) -> Figure:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    height = min(max(3.2, 0.2 * len(counts) + 1.5), 9)
    figure = style.panels(size=(min(max(5.5, 0.35 * len(groups) + 2.5), 12), height))
    axes = figure.axes[0]
    axes.grid(visible=False)
    image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the client's training rows", format="{x:.0%}")
    axes.set_title("What each client trains on", loc="left")
    if len(groups) <= _MAX_CLIENT_NAMES:
        axes.set_xticks(range(len(groups)), groups, rotation=45, ha="right")
    else:
        axes.set_xlabel("group")
    _name_clients(axes.yaxis, range(len(counts)), "client")
    return figure


def _name_clients(axis: Any, cids: Sequence[int], unnamed: str) -> None:
    """Write client ids on an axis where there is room, else only what the axis shows."""
    if len(cids) > _MAX_CLIENT_NAMES:
        axis.set_label_text(unnamed)
        return
    axis.set_ticks(range(len(cids)), [str(cid) for cid in cids])
    axis.set_label_text("client")


def _dots(count: int) -> dict[str, Any]:
    """Return the look of a line: with a dot at each point as long as they can be told apart."""
    return {"linewidth": 1.6, "marker": "o", "markersize": 4 if count <= 40 else 0}
