"""How figures look: one size, one palette that colour-blind readers can tell apart, no clutter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedllm.results.history import is_share

# Okabe and Ito's palette
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#8C8C8C"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY)

PANEL_INCHES = (4.6, 3.3)
_UNITS = {"loss": "loss (nats per token)", "rouge_l": "ROUGE-L", "f1": "F1", "token_f1": "token F1"}


def panels(rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None) -> Figure:
    """Return a figure with `rows` x `columns` axes, apart from pyplot's global state.

    Args:
        rows: Panels from top to bottom.
        columns: Panels from left to right.
        size: Width and height in inches; by default that of the panels.
    """
    width, height = size or (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows)
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure


def metric_label(metric: str) -> str:
    """Return the name of a metric as a reader says it, with its unit."""
    return _UNITS.get(metric, metric.replace("_", " "))


def metric_axis(axis: Any, metric: str) -> None:
    """Label an axis with a metric; shares are shown in per cent."""
    axis.set_label_text(metric_label(metric))
    if is_share(metric):
        axis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=None))


def round_axis(axes: Any, label: str = "round") -> None:
    """Label the horizontal axis with whole rounds, or with what else is counted."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG that is sharp on paper and screen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path
