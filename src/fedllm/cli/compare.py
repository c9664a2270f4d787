"""`fedllm report` and `fedllm compare`: what runs came to, as a page and side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm.cli.figures import bytes_text, duration_text, value_text
from fedllm.errors import RunError
from fedllm.results.compare import COSTS, TOTALS, Group, Spread, compare
from fedllm.results.compare_plots import draw

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    **{sign: f"\\{sign}" for sign in "_%&#${}"},
}
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
            safe = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
            lines = [safe[0], ["---"] * len(head), *safe[1:]]
            text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            console.print(text, soft_wrap=True, markup=False, highlight=False)
        case "latex":
            text = _latex(head, rows)
            console.print(text, soft_wrap=True, markup=False, highlight=False)
        case "text":
            _print_text(console, groups, head, rows)
    if to is not None:
        for path in draw(groups, to):
            if form == "text":
                console.print(str(path), soft_wrap=True, highlight=False, markup=False)


def _print_text(
    console: Console, groups: Sequence[Group], head: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print a column for each group, then every setting in which groups differ."""
    table, differing = (Table(box=None, padding=(0, 2)) for _ in range(2))
    for title, own in (("", table), ("setting", differing)):
        for column in (title, *(row[0] for row in rows)):
            own.add_column(Text(column), overflow="fold")
    for place, name in enumerate(head[1:], start=1):
        table.add_row(name, *(row[place] for row in rows))
    console.print(table)
    if len(groups) > 1:
        for key in groups[0].settings:
            cells = [Text(_setting(group.settings[key])) for group in groups]
            differing.add_row(Text(key), *cells)
        console.print("\nthe groups differ in")
        console.print(differing)


def _setting(value: Any) -> str:
    """Write a setting as it stands in YAML; a dash where a group has none of the kind."""
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _target(word: str | None) -> tuple[str | None, float | None]:
    if word is None:
        return None, None
    name, _, number = word.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RunError(f"--target {word}: give a number, or METRIC=NUMBER, such as loss=0.5")
    return name or None, value


def _table(groups: Sequence[Group], target: float | None) -> tuple[list[str], list[list[str]]]:
    metric = groups[0].runs[0].metric
    head = ["group", "runs", f"{metric}, last", "best", *TOTALS.values()]
    if target is not None:
        head += [f"{name} to {target:g}" for name in COSTS.values()]
    rows = []
    for group in groups:
        figures, count = group.figures, len(group.runs)
        row = [group.label, _runs(group), _value(figures["last"]), _value(figures["best"])]
        row += [_cost(cost, figures[cost], count) for cost in TOTALS]
        if target is not None:
            row += [_to_target(cost, group) for cost in COSTS]
        rows.append(row)
    return head, rows


def _runs(group: Group) -> str:
    """Write how many runs there are, and how many of them have not come to their end."""
    unfinished = sum(not run.is_finished for run in group.runs)
    return str(len(group.runs)) + (f" ({unfinished} unfinished)" if unfinished else "")


def _value(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return value_text(spread.mean) + (f" ± {spread.deviation:.3f}" if spread.count > 1 else "")


def _cost(cost: str, spread: Spread | None, runs: int) -> str:
    """Write a cost with its deviation; a dash where it is not known."""
    if spread is None:
        return "-"
    told = _amount(cost, spread.mean)
    if spread.count > 1:
        told += f" ± {_amount(cost, spread.deviation)}"
    return told + (f" ({spread.count} of {runs})" if spread.count < runs else "")


def _amount(cost: str, amount: float) -> str:
    if cost == "round":
        return f"{amount:.3g}"
    if cost == "virtual_time_s":
        return duration_text(amount)
    return f"{amount / 1e3:.3g} kJ" if cost == "energy_total_j" else bytes_text(amount)


def _to_target(cost: str, group: Group) -> str:
    """Write what the target cost; a target that was not reached is told from an unknown cost."""
    spread = group.figures[f"{cost} to target"]
    if spread is None and any(run.costs[cost] for run in group.runs):
        return "not reached"
    return _cost(cost, spread, len(group.runs))


def _as_dict(group: Group) -> dict[str, Any]:
    return {
        "label": group.label,
        "runs": [str(run.path) for run in group.runs],
        "unfinished": [str(run.path) for run in group.runs if not run.is_finished],
        "settings": dict(group.settings),
        "metric": group.runs[0].metric,
        "view": group.runs[0].view,
        "figures": {k: None if s is None else asdict(s) for k, s in group.figures.items()},
    }


def _latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        safe = ["".join(_LATEX.get(sign, sign) for sign in cell) for cell in cells]
        return " & ".join(safe) + r" \\"

    body = [line(head), r"\midrule", *(line(row) for row in rows)]
    return "\n".join(
        [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", *body, r"\bottomrule",
         r"\end{tabular}"]
    )  # fmt: skip
