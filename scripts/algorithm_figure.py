"""The figure of an algorithm: what happens to a layer's tensors, and bytes beside FedIT's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from fedllm.results import style

LOOKS = {
    "trained and sent": (style.BLUE, "white"),
    "trained, sent and kept": (style.PURPLE, "white"),
    "trained and kept": (style.GREEN, "white"),
    "trained": (style.SKY, "black"),
    "frozen, received": (style.YELLOW, "black"),
    "frozen, known": ("#E3E3E3", "black"),
}
"""Role of a tensor to the colours of its box and text."""
STAGES = {
    "": "other rounds",
    "train_b": "odd rounds",
    "train_a": "even rounds",
    "personal": "last rounds",
    "sparse": "first rounds",
    "alone": "warm-up",
    "gather": "end of the warm-up",
    "together": "after the warm-up",
}
"""Names of stages as a reader says them."""
_WIDE, _HIGH, _STEP = 1.15, 0.62, 1.3


@dataclass(frozen=True)
class Stage:
    """What happens to each tensor of a layer in one phase."""

    name: str
    paths: Mapping[str, Mapping[str, str]]
    """Slot to kind of tensor to role (a key of `LOOKS`)."""


def draw(
    stages: Sequence[Stage], own: tuple[float, float], fedit: tuple[float, float], to: TextIO
) -> None:
    """Write the figure as SVG: the same text for the same input."""
    widths = [max(2.6, _STEP * max(len(k) for k in s.paths.values()) + 1.5) for s in stages]
    rows = max(len(stage.paths) for stage in stages)
    high = 0.78 * rows + 1.5
    with matplotlib.rc_context({"svg.hashsalt": "fedllm", "svg.fonttype": "none"}):
        figure = Figure(figsize=(sum(widths) + 3.4, high))
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1, len(stages) + 1, width_ratios=[*widths, 3.0], wspace=0.08)
        for column, (stage, width) in enumerate(zip(stages, widths, strict=True)):
            _stage(figure.add_subplot(grid[column]), stage, width, rows)
        _bars(figure.add_subplot(grid[len(stages)]), own, fedit)
        seen = {role for s in stages for kinds in s.paths.values() for role in kinds.values()}
        _legend(figure, [role for role in LOOKS if role in seen])
        figure.subplots_adjust(left=0.01, right=0.985, top=1 - 0.42 / high, bottom=0.62 / high)
        figure.savefig(to, format="svg", metadata={"Date": None, "Creator": None})


def _stage(axes: Any, stage: Stage, width: float, rows: int) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(-rows, 0.05)
    axes.axis("off")
    axes.set_title(STAGES.get(stage.name, stage.name), fontsize=10, loc="left")
    for row, (slot, kinds) in enumerate(stage.paths.items()):
        axes.text(0.05, -row - 0.5, slot or "layer", va="center", fontsize=9, color="#555555")
        for place, (kind, role) in enumerate(_ordered(kinds)):
            fill, ink = LOOKS[role]
            left = 1.2 + place * _STEP
            axes.add_patch(
                FancyBboxPatch(
                    (left, -row - 0.5 - _HIGH / 2),
                    _WIDE,
                    _HIGH,
                    boxstyle="round,pad=0,rounding_size=0.08",
                    facecolor=fill,
                    edgecolor="none",
                )
            )
            middle = left + _WIDE / 2
            axes.text(middle, -row - 0.5, kind, ha="center", va="center", color=ink, fontsize=10)


def _ordered(kinds: Mapping[str, str]) -> list[tuple[str, str]]:
    order = ["B", "core", "A", "gain", "router", "values", "index"]
    return sorted(kinds.items(), key=lambda item: order.index(item[0]))


def _bars(axes: Any, own: tuple[float, float], fedit: tuple[float, float]) -> None:
    shares = [a / b for a, b in zip(own, fedit, strict=True)]
    axes.barh([1, 0], shares, color=[style.BLUE, style.SKY], height=0.55)
    axes.axvline(1.0, color="#777777", linewidth=1, linestyle="--")
    for place, share in zip((1, 0), shares, strict=True):
        axes.text(share, place, f" {share:.2g}", va="center", fontsize=9)
    axes.set_yticks([1, 0], ["up", "down"])
    axes.set_xlim(0, 1.3 * max(1.0, *shares))
    axes.set_ylim(-0.6, 1.6)
    axes.set_title("bytes, FedIT = 1", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _legend(figure: Any, roles: Sequence[str]) -> None:
    boxes = [
        FancyBboxPatch((0, 0), 1, 1, facecolor=LOOKS[role][0], edgecolor="none") for role in roles
    ]
    figure.legend(
        boxes, roles, loc="lower left", ncols=len(roles), frameon=False, fontsize=9, borderpad=0.2
    )
