"""`fedllm eval`: what a run, an adapter or a model is worth on held-out rows and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer
from rich.console import Console

from fedllm.cli.errors import reported
from fedllm.cli.figures import value_text
from fedllm.cli.inspect import new_table
from fedllm.results import strict_json
from fedllm.results.storage import explained, write_text

if TYPE_CHECKING:
    from fedllm.experiment.evaluate import Evaluated

_MAX_CLIENTS = 20
_SCOPES: dict[str, tuple[Literal["global", "personal"], ...]] = {
    "global": ("global",),
    "personal": ("personal",),
    "both": ("global", "personal"),
}
_VIEWS: Mapping[str, tuple[str, ...]] = {
    "global": ("global",),
    "mean of clients": ("clients", "mean"),
    "worst 10 %": ("clients", "worst_10"),
    "personal": ("personal", "overall"),
    "personal mean": ("personal", "mean"),
    "personal worst 10 %": ("personal", "worst_10"),
}


def evaluate(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, as runs/demo.")],
    client: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="CID", help="Use this client's test rows alone."),
    ] = None,
    scope: Annotated[
        Optional[Literal["global", "personal", "both"]],  # noqa: UP045
        typer.Option(help="The global view, each client's own, or both; default: as the run."),
    ] = None,
    save: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.json", help="Write metrics and predictions there."),
    ] = None,
) -> None:
    """Evaluate a run's last checkpoint on all test rows."""
    console = Console()
    with reported():
        from fedllm.experiment.evaluate import evaluate as carry_out

        with console.status("restoring the run") as status:
            found = carry_out(
                path,
                scopes=None if scope is None else _SCOPES[scope],
                client=client,
                say=status.update,
                progress=lambda count: status.update(f"evaluating · {count} answers generated"),
            )
        print_evaluation(console, found)
        if save is not None:
            save_evaluation(save, path, found)
            console.print(f"saved to {save}", soft_wrap=True, highlight=False)


def print_evaluation(console: Console, found: Evaluated) -> None:
    """Print one evaluation: metrics by view, then by client where there are few."""
    record = found.evaluation.record
    views = {name: _at(record, *place) for name, place in _VIEWS.items()}
    views = {name: values for name, values in views.items() if values}
    table = new_table("", *found.metrics)
    for name, values in views.items():
        table.add_row(name, *(value_text(values.get(metric)) for metric in found.metrics))
    console.print(f"after round {found.version}, on {found.num_rows} test rows", highlight=False)
    console.print(table)
    by_view = {name: _at(record, name, "by_client") for name in ("clients", "personal")}
    _print_clients(console, {n: v for n, v in by_view.items() if v}, found.metrics[0])


def save_evaluation(file: Path, run: Path, found: Evaluated) -> None:
    """Write metrics and predictions as one JSON object.

    Raises:
        RunError: If the file cannot be written.
    """
    saved = {
        "run": str(run),
        "round": found.version,
        "eval": found.evaluation.record,
        "predictions": list(found.evaluation.predictions),
    }
    with explained(file, "The run itself is untouched."):
        write_text(file, strict_json(saved) + "\n")


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
