"""Pictures of runs side by side: quality against each cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedllm.errors import RunError
from fedllm.results import style
from fedllm.results.compare import COSTS, Group
from fedllm.results.history import is_share
from fedllm.results.storage import explained
from fedllm.results.time_plots import time_unit

_LINES = ("-", "--", ":", "-.")


def draw(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Draw the metric of every run against each cost, a colour for each group.

    Returns:
        The files written; a cost that is not known of any run is left out.

    Raises:
        RunError: If a file is there already, before anything is written, or one cannot be written.
    """
    ends = {
        cost: max((r.spent(cost) or 0.0 for g in groups for r in g.runs), default=0.0)
        for cost in COSTS
    }
    paths = {cost: folder / f"{cost}.png" for cost, end in ends.items() if end > 0.0}
    for path in paths.values():
        if path.exists():
            raise RunError(f"{path} exists, and nothing is overwritten; choose another folder")
    with explained(folder, "The runs are untouched."):
        return [style.save(_drawn(groups, cost, ends[cost]), path) for cost, path in paths.items()]


def _drawn(groups: Sequence[Group], cost: str, end: float) -> Figure:
    unit, unit_name = _unit(cost, end)
    figure = style.panels(size=(7.0, 4.2))
    axes = figure.axes[0]
    for place, group in enumerate(groups):
        rank, color = divmod(place, len(style.PALETTE))
        look: dict[str, Any] = {
            "color": style.PALETTE[color],
            "linestyle": _LINES[rank % len(_LINES)],
        }
        look["label"] = group.label
        for run in group.runs:
            points = [(run.spent(cost, x), y) for x, y in run.values.items()]
            known = [(spent / unit, y) for spent, y in points if spent is not None]
            if known:
                axes.plot(*zip(*known, strict=True), marker=".", **look)
                look["label"] = None
    metric = groups[0].runs[0].metric
    axes.set_xlabel(f"{COSTS[cost]} ({unit_name})" if unit_name else COSTS[cost])
    style.metric_axis(axes.yaxis, metric)
    if is_share(metric):
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _unit(cost: str, end: float) -> tuple[float, str]:
    if cost == "virtual_time_s":
        return time_unit(end)
    return {"bytes_total": (1e6, "MB"), "energy_total_j": (1e3, "kJ")}.get(cost, (1.0, ""))
