"""A picture of a trace: windows of some clients, and how many are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedllm.results import style

_HOUR_S = 3600.0


def plot_trace(
    windows: Mapping[str, Sequence[tuple[float, float]]],
    times_s: Sequence[float],
    shares: Sequence[float],
    path: Path,
) -> Path:
    """Draw windows as bars, a row for each client, above the share that is there over time."""
    figure = style.panels(2, 1, size=(9.0, max(4.0, 0.16 * len(windows) + 3.0)))
    rows, curve = figure.axes
    for place, own in enumerate(windows.values()):
        bars = [(low / _HOUR_S, (high - low) / _HOUR_S) for low, high in own]
        rows.broken_barh(bars, (place - 0.4, 0.8), color=style.BLUE)
    rows.set_yticks(range(len(windows)), list(windows), fontsize="x-small")
    rows.set_title(f"When {len(windows)} clients are there", loc="left")
    rows.invert_yaxis()
    rows.grid(visible=False, axis="y")
    curve.plot([time_s / _HOUR_S for time_s in times_s], shares, color=style.BLUE)
    curve.set_ylim(0, 1)
    curve.set_ylabel("share of all clients")
    for axes in figure.axes:
        axes.set_xlim(0, max(times_s, default=1.0) / _HOUR_S)
        axes.set_xlabel("hours from the beginning of the trace")
    return style.save(figure, path)
