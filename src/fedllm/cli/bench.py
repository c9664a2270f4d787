"""`fedllm bench`: a matrix of runs with its progress, and the table at the end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedllm.cli.figures import bytes_text
from fedllm.cli.inspect import new_table
from fedllm.errors import RunError
from fedllm.experiment.comparison import Figure, Line, lines, write
from fedllm.experiment.matrix import Done, Matrix, carry_out, cells


def bench(console: Console, matrix: Matrix, folder: Path, workers: int) -> None:
    """Run what is missing, then print and write the table.

    Raises:
        RunError: If runs failed; the table of the others is written all the same.
    """
    failed: list[Done] = []
    planned = cells(matrix, folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(matrix.name, total=len(planned))

        def told(done: Done) -> None:
            cell = done.cell
            words = " ".join(filter(None, (cell.setting, cell.label, f"seed {cell.seed}")))
            progress.update(task, advance=1, description=words)
            if done.error:
                failed.append(done)
                progress.console.print(f"failed: {words}: {done.error}", highlight=False)

        carry_out(matrix, folder, workers=workers, told=told)
    table = lines(planned)
    print_table(console, table)
    for path in write(table, folder):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    if failed:
        names = ", ".join(sorted({done.cell.label for done in failed}))
        raise RunError(
            f"{len(failed)} of {len(planned)} runs failed ({names}); mend the cause and start the"
            " same command again: finished runs are kept"
        )


def print_table(console: Console, table: list[Line]) -> None:
    """Print a table for each setting."""
    for setting in dict.fromkeys(line.setting for line in table):
        own = [line for line in table if line.setting == setting]
        metric = next((line.metric for line in own if line.metric), "nothing measured")
        title = f"{setting} · {metric}, mean ± deviation over seeds"
        shown = new_table(
            "algorithm", "global", "own data", "worst", "traffic", "agg_error", title=title
        )
        for line in own:
            shown.add_row(
                line.label,
                _text(line.overall),
                _text(line.own),
                _text(line.worst),
                _traffic(line),
                "-" if line.agg_error is None else f"{line.agg_error.mean:.2g}",
            )
        console.print(shown)


def _text(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    # a share needs no zero before its point, and six columns need the room
    return " ± ".join(f"{x:.3f}".removeprefix("0") for x in (figure.mean, figure.deviation))


def _traffic(line: Line) -> str:
    if line.up_bytes is None or line.down_bytes is None:
        return "-"
    return bytes_text(line.up_bytes.mean + line.down_bytes.mean)
