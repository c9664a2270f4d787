"""The commands that sum runs up: `fedllm report` and `fedllm compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from fedllm.cli.errors import reported


def report(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, as runs/demo.")],
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE.html", help="A new file; default RUN/report.html."),
    ] = None,
) -> None:
    """Write one HTML page about a run, with figures to zoom into."""
    with reported():
        from fedllm.results import RunDir
        from fedllm.results.report import write_report

        typer.echo(str(write_report(RunDir.open(path), to)))


def compare(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    target: Annotated[
        str | None,
        typer.Option(metavar="[METRIC=]VALUE", help="Tell what it took to get there."),
    ] = None,
    form: Annotated[
        Literal["text", "json", "markdown", "latex"], typer.Option("--format", help="Of the table.")
    ] = "text",
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Draw the courses into this folder."),
    ] = None,
) -> None:
    """Compare runs: quality, time, bytes and energy, mean and deviation over seeds."""
    with reported():
        from fedllm.cli.compare import print_comparison

        print_comparison(Console(), paths, target, form, to)
