"""Prints evaluations: metrics by view, clients, classes, benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from fedllm.cli.figures import value_text
from fedllm.cli.inspect import new_table, print_line

if TYPE_CHECKING:
    from fedllm.evaluation import ClassFigures
    from fedllm.evaluation.choices import ChoiceResult
    from fedllm.experiment.evaluate import Evaluated

_MAX_CLIENTS = 20
_VIEWS: Mapping[str, tuple[str, ...]] = {
    "global": ("global",),
    "mean of clients": ("clients", "mean"),
    "worst 10 %": ("clients", "worst_10"),
    "personal": ("personal", "overall"),
    "personal mean": ("personal", "mean"),
    "personal worst 10 %": ("personal", "worst_10"),
}


def print_evaluation(console: Console, found: Evaluated) -> None:
    """Print one evaluation: metrics by view, then by client where there are few."""
    record = found.evaluation.record
    views = {name: _at(record, *place) for name, place in _VIEWS.items()}
    views = {name: values for name, values in views.items() if values}
    table = new_table("", *found.metrics)
    for name, values in views.items():
        table.add_row(name, *(value_text(values.get(metric)) for metric in found.metrics))
    when = "" if found.version is None else f"after round {found.version}, "
    console.print(f"{when}on {found.num_rows} test rows", highlight=False)
    console.print(table)
    by_view = {name: _at(record, name, "by_client") for name in ("clients", "personal")}
    _print_clients(console, {n: v for n, v in by_view.items() if v}, found.metrics[0])
    for view, report in found.evaluation.reports.items():
        _print_classes(console, view, report)
    for name, signature in record.get("signatures", {}).items():
        print_line(console, f"{name}: {signature}")


def as_saved(found: Evaluated) -> dict[str, Any]:
    """Return one evaluation as it is saved."""
    from fedllm.evaluation.classes import as_json

    return {
        "round": found.version,
        "eval": found.evaluation.record,
        "classes": {view: as_json(r) for view, r in found.evaluation.reports.items()},
        "predictions": list(found.evaluation.predictions),
    }


def print_choices(console: Console, found: ChoiceResult) -> dict[str, Any]:
    """Print the share of right answers by subject; return it as it is saved."""
    table = new_table("subject", "questions", "accuracy")
    for name, share in found.subjects.items():
        table.add_row(name, str(found.counts[name]), value_text(share))
    total = str(sum(found.counts.values()))
    table.add_row(
        "mean over subjects", str(len(found.counts)), value_text(found.macro), style="bold"
    )
    table.add_row("mean over questions", total, value_text(found.micro), style="bold")
    console.print(table)
    if found.shortened:
        print_line(
            console,
            f"note: {found.shortened} questions had fewer shots, as the model's positions ended",
        )
    figures = {n: {"accuracy": s, "count": found.counts[n]} for n, s in found.subjects.items()}
    return {
        "macro": found.macro,
        "micro": found.micro,
        "shortened": found.shortened,
        "subjects": figures,
    }


def print_harness(console: Console, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what lm-eval found."""
    table = new_table("task", "metric", "value")
    table.columns[1].justify = "left"
    for task, figures in found.items():
        for name, value in figures.items():
            if isinstance(value, float) and "_stderr" not in name:
                table.add_row(task, name.removesuffix(",none"), value_text(value))
    console.print(table)


def _print_classes(console: Console, view: str, report: Mapping[str, ClassFigures]) -> None:
    table = new_table("class", "precision", "recall", "f1", "rows", title=f"classes, {view} view")
    for name, figures in report.items():
        cells = (figures.precision, figures.recall, figures.f1)
        table.add_row(Text(name), *map(value_text, cells), str(figures.support))
    console.print(table)


def _print_clients(console: Console, by_view: Mapping[str, Any], metric: str) -> None:
    """Print the main metric of each client, the worst first."""
    clients = list(next(iter(by_view.values()), {}))
    if not 1 < len(clients) <= _MAX_CLIENTS:
        return
    names = {"clients": "global view", "personal": "own view"}
    table = new_table("client", *(names[view] for view in by_view), title=f"{metric} by client")
    for cid in clients:
        cells = [value_text(view.get(cid, {}).get(metric)) for view in by_view.values()]
        table.add_row(cid, *cells)
    console.print(table)


def _at(record: Mapping[str, Any], *place: str) -> Mapping[str, Any]:
    for part in place:
        record = record.get(part) or {}
    return record
