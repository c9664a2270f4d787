"""Prints what is there: tables of names, the figures of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm.cli.figures import bytes_text, duration_text, sparkline, value_text
from fedllm.results import (
    History,
    MetricRow,
    Overview,
    RunDir,
    overview,
    resume_command,
    summary_rows,
)

if TYPE_CHECKING:
    from fedllm.cli.tables import Row

_FOR_JSON = {
    "settings",
    "optimizers",
    "no_optimizer",
    "paper",
    "profile",
    "system",
    "reasons",
    "schedules",
}
_MAIN_VIEWS = ("global", "personal mean")


def new_table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table; the first column is text, the others are numbers."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    return table


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Print a table of names; settings go under the algorithm they belong to.

    What is a sentence or a list of its own is for `--json` alone.
    """
    keys = [key for key in rows[0] if key not in _FOR_JSON]
    table = Table(box=box.SIMPLE_HEAD)
    for key in keys:
        is_wide = key in {"what", "tasks", "rows"}
        table.add_column(key.replace("_", " "), no_wrap=not is_wide, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[key]) for key in keys))
        for name, setting in row.get("settings", {}).items():
            text = f"{name}: {setting['type']} (default {_default(setting['default'])})"
            table.add_row("", Text(text, style="dim"))
    console.print(table)


def _default(value: Any) -> str:
    """Write a default as it stands in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


def run_as_dict(run: RunDir) -> dict[str, Any]:
    """Return what `fedllm show --json` prints."""
    facts = overview(run)
    return {
        **asdict(facts),
        "is_finished": facts.is_finished,
        "path": str(run.path),
        "metrics": [asdict(row) for row in summary_rows(run)],
        "plots": [str(path) for path in plots_of(run)],
    }


def plots_of(run: RunDir) -> list[Path]:
    """Return the pictures that are there."""
    return sorted((run.path / "plots").glob("*.png"))


def print_run(console: Console, run: RunDir, *, is_full: bool = True) -> None:
    """Print what a run was, how its metrics went, and where its plots are.

    Args:
        console: Where to.
        run: Only read.
        is_full: Show all views of all metrics; else of the main metric alone.
    """
    facts = overview(run)
    federated = facts.steps is None
    fleet = f" · {facts.num_clients} clients, {facts.cohort_size} a round" if federated else ""
    console.print(
        Text.assemble(
            (facts.name, "bold"),
            f" · {facts.algorithm} · {facts.model} · {facts.data}, {facts.partition}"
            f"{fleet} · seed {facts.seed}",
        ),
        soft_wrap=True,
    )
    _print_metrics(console, run, is_full, "round" if federated else "evaluation")
    done = f"{facts.steps} steps"
    if federated:
        done = f"round {facts.rounds_done} of {facts.rounds_planned}"
        done += f" · up {bytes_text(facts.bytes_up)}, down {bytes_text(facts.bytes_down)}"
    print_line(console, f"{done} · {duration_text(facts.wall_s)}")
    for line in _exchange_lines(facts):
        print_line(console, line)
    if not facts.is_finished:
        print_line(console, f"not finished; continue with: {resume_command(run.path)}")
    if plots_of(run):
        print_line(console, f"plots: {run.path / 'plots'}/*.png")


def _exchange_lines(facts: Overview) -> list[str]:
    """Say how faithful the aggregation was, whom it refused, and what privacy was spent."""
    lines = _world_lines(facts)
    if facts.agg_error is not None and facts.last_agg_error is not None:
        mean, last = (
            f"{error:.2g}" if error >= 1e-12 else "0"
            for error in (facts.agg_error, facts.last_agg_error)
        )
        lines.append(f"aggregation error {mean} on average, {last} in the last round")
    if facts.server_s and facts.rounds_done:
        took_ms = 1000 * facts.server_s / facts.rounds_done
        lines.append(f"aggregation took the server {took_ms:.3g} ms a round")
    if facts.rejected:
        lines.append(f"rejected updates: {facts.rejected}; why stands in metrics.jsonl")
    if facts.privacy is not None:
        value = facts.privacy["value"]
        told = "no epsilon" if value is None else f"epsilon {value:.3g}"
        lines.append(
            f"privacy: {told} at delta {facts.privacy['delta']:g}. {facts.privacy['reason']}"
        )
    return lines


def _world_lines(facts: Overview) -> list[str]:
    """Say what passed in virtual time, and why the run ended if it did so early."""
    lines = [f"ended early: {facts.ended}"] if facts.ended else []
    if facts.virtual_s:
        jobs = ", ".join(f"{count} {outcome}" for outcome, count in facts.outcomes.items())
        told = f"virtual time {duration_text(facts.virtual_s)} · jobs: {jobs}"
        lines.append(told + (f" · {facts.energy_j / 1e3:.3g} kJ" if facts.energy_j else ""))
    return lines


def _print_metrics(console: Console, run: RunDir, is_full: bool, number: str) -> None:
    rows, history = summary_rows(run), History.of(run)
    if not is_full:
        rows = [row for row in rows if row.is_main or row.view in _MAIN_VIEWS]
    if not rows:
        print_line(console, "\nnothing was evaluated yet\n")
        return
    table = new_table("metric", "of", "first", "last", "best", number, "course")
    table.columns[1].justify = table.columns[6].justify = "left"
    for place, row in enumerate(rows):
        is_new = place == 0 or rows[place - 1].metric != row.metric
        table.add_row(*_metric_cells(row, history, is_new), style="bold" if row.is_main else "")
    console.print(table)


def _metric_cells(row: MetricRow, history: History, is_new: bool) -> list[str]:
    return [
        row.metric if is_new else "",
        row.view.replace(" of clients", "").replace(",", ""),
        value_text(row.first),
        value_text(row.last),
        value_text(row.best),
        str(row.best_round),
        sparkline(history.evaluated(row.view, row.metric).values, 10),
    ]


def print_next(console: Console, run: RunDir, *, is_personal: bool) -> None:
    """Print the three commands to try after a run."""
    scope = " --scope personal" if is_personal else ""
    print_line(console, "\nnext:")
    for command in (
        f"fedllm show {run.path}",
        f"fedllm eval {run.path}{scope}",
        f"fedllm export {run.path} --to {run.path.name}-adapter",
    ):
        console.print(Text(f"  {command}", style="cyan"), soft_wrap=True)


def print_line(console: Console, text: str) -> None:
    """Print a line as it is, however long."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
