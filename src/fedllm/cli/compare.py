"""`fedllm report` and `fedllm compare`: what runs came to, as a page and side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from fedllm.cli.figures import bytes_text, duration_text, value_text
from fedllm.errors import RunError
from fedllm.results.compare import COSTS, Group, Spread, compare, draw

Format = Literal["text", "json", "markdown", "latex"]


def print_comparison(
    console: Console, paths: Sequence[Path], target: str | None, form: Format, to: Path | None
) -> None:
    """Compare runs, print the table, and draw it.

    Args:
        console: Where to.
        paths: Run directories.
        target: `0.7`, or `METRIC=0.7`, whose cost is asked for.
        form: How the table is written.
        to: A folder for pictures; None for none.
    """
    metric, value = _target(target)
    groups = compare(paths, value, metric)
    head, rows = _table(groups, value)
    match form:
        case "json":
            console.print_json(json.dumps([_as_dict(group) for group in groups]))
        case "markdown":
            lines = [head, ["---"] * len(head), *rows]
            text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            console.print(text, soft_wrap=True, markup=False, highlight=False)
        case "latex":
            text = _latex(head, rows)
            console.print(text, soft_wrap=True, markup=False, highlight=False)
        case "text":
            table = Table(head[0], *(row[0] for row in rows), box=None, padding=(0, 2))
            for place, name in enumerate(head[1:], start=1):
                table.add_row(name, *(row[place] for row in rows))
            console.print(table)
    if to is not None:
        to.mkdir(parents=True, exist_ok=True)
        for path in draw(groups, to):
            if form == "text":
                console.print(str(path), soft_wrap=True, highlight=False)


def _target(word: str | None) -> tuple[str | None, float | None]:
    if word is None:
        return None, None
    name, _, number = word.rpartition("=")
    try:
        return name or None, float(number)
    except ValueError:
        raise RunError(f"--target {word}: give a number, or METRIC=NUMBER") from None


def _table(groups: Sequence[Group], target: float | None) -> tuple[list[str], list[list[str]]]:
    metric = groups[0].runs[0].metric
    head = ["runs", "seeds", f"{metric}, last", "best", *COSTS.values()]
    if target is not None:
        head += [f"{name} to {target:g}" for name in COSTS.values()]
    rows = []
    for group in groups:
        figures, count = group.figures, len(group.runs)
        row = [group.label, str(count), _value(figures["last"]), _value(figures["best"])]
        row += [_cost(cost, figures[cost], count) for cost in COSTS]
        if target is not None:
            row += [_cost(cost, figures[f"{cost} to target"], count) for cost in COSTS]
        rows.append(row)
    return head, rows


def _value(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return value_text(spread.mean) + (f" ± {spread.deviation:.3f}" if spread.count > 1 else "")


def _cost(cost: str, spread: Spread | None, runs: int) -> str:
    """Write a cost; of runs that never reached the target it says so."""
    if spread is None:
        return "not reached"
    texts = {
        "round": f"{spread.mean:g}",
        "virtual_time_s": duration_text(spread.mean),
        "bytes_total": bytes_text(spread.mean),
        "energy_total_j": f"{spread.mean / 1e3:.3g} kJ",
    }
    return texts[cost] + (f" ({spread.count} of {runs})" if spread.count < runs else "")


def _as_dict(group: Group) -> dict[str, Any]:
    return {
        "label": group.label,
        "runs": [str(run.path) for run in group.runs],
        "settings": dict(group.settings),
        "metric": group.runs[0].metric,
        "view": group.runs[0].view,
        "figures": {k: None if s is None else asdict(s) for k, s in group.figures.items()},
    }


def _latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        safe = [
            cell.replace("\\", "").replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")
            .replace("±", r"$\pm$")
            for cell in cells
        ]  # fmt: skip
        return " & ".join(safe) + r" \\"

    body = [line(head), r"\midrule", *(line(row) for row in rows)]
    return "\n".join(
        [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", *body, r"\bottomrule",
         r"\end{tabular}"]
    )  # fmt: skip
