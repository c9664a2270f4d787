"""Shows a central run: what it would be, how it goes on, what came of it."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from fedllm.cli.figures import bytes_text, count_text, value_text
from fedllm.cli.plan import coloured

if TYPE_CHECKING:
    from fedllm.central.check import CentralReport
    from fedllm.central.parts import Parts
    from fedllm.config import CentralConfig


class CentralView:
    """Prints lines, and a moving bar where there is a terminal.

    Args:
        console: Where to.
        is_silent: Print nothing.
    """

    def __init__(self, console: Console, *, is_silent: bool) -> None:
        self._console, self._is_silent = console, is_silent
        self.path: Path | None = None
        """The run directory, once training has begun."""
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            console=console,
            disable=is_silent or not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, told="", visible=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print what is being done."""
        self._print(f"{text} ...")

    def ready(self) -> None:
        """Search for garbage again, but not among what was loaded: it stays to the end."""
        gc.freeze()
        gc.enable()

    def begin(self, parts: Parts, path: Path, steps: int) -> None:
        """Print what the run is."""
        self.path = path
        config, data = parts.config, parts.data
        count = sum(tensor.numel() for tensor in parts.tuned.trained().values())
        lost = [f"{n} dropped ({why})" for why, n in data.dropped.items()]
        lost += [f"{data.truncated} shortened"] if data.truncated else []
        rows = "streamed" if config.data.streaming else str(len(data.train))
        self._print(
            f"{config.stage} · {config.model.path} · {config.adapter.method}, {count_text(count)}"
            f" trainable · {rows} train rows, {len(data.test)} test"
            f" ({', '.join(lost) or 'none dropped'}) · {steps} steps"
        )
        self._bar.update(self._task, total=steps, visible=True)

    def log(self, line: Mapping[str, Any]) -> None:
        """Print the loss."""
        told = f"loss {value_text(line['loss'])}  lr {line.get('lr', 0.0):.2e}"
        told += f"  left {line['remaining_time']}"
        self._bar.update(self._task, completed=line["current_steps"], told=told)
        if not self._console.is_terminal:
            self._print(f"step {line['current_steps']}/{line['total_steps']}  {told}")

    def record(self, record: Mapping[str, Any]) -> None:
        """Print an evaluation."""
        values = record["eval"]["global"]
        words = [f"{name} {value_text(value)}" for name, value in values.items()]
        self._print(f"evaluation {record['round']} at step {record['step']}  {'  '.join(words)}")

    def _print(self, text: str) -> None:
        if not self._is_silent:
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)


def print_end(console: Console, path: Path, config: CentralConfig, *, is_quiet: bool) -> None:
    """Print where the result is, and the commands to try."""
    if is_quiet:
        console.print(str(path), soft_wrap=True, markup=False, highlight=False)
        return
    folder = "adapter" if config.adapter.method == "lora" else "model"
    console.print(f"\nwritten to {path / folder}\nnext:", soft_wrap=True, highlight=False)
    name, form = path.name, "" if folder == "adapter" else " --merged"
    commands = [f"show {path}", f"export {path} --to {name}-{folder}{form}"]
    if config.stage != "rm":
        commands[1:1] = [f"eval {path}", f"chat {path}"]
    for command in commands:
        console.print(Text(f"  fedllm {command}", style="cyan"), soft_wrap=True)


def print_report(console: Console, report: CentralReport) -> None:
    """Print what a run would be."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for name, text in (*_data(report), *_model(report)):
        facts.add_row(name, text)
    console.print(facts, highlight=False)
    _print_example(console, "example", report.example)
    if report.worse:
        _print_example(console, "the worse answer", report.worse)


def _data(report: CentralReport) -> list[tuple[str, str]]:
    data, config = report.data, report.config
    lost = [f"{count} dropped ({why})" for why, count in data.dropped.items()]
    lost += [f"{data.truncated} shortened"] if data.truncated else []
    rows = "streamed (figures of test rows)" if config.data.streaming else len(data.train)
    quantiles = np.percentile(data.train.lengths, [0, 50, 90, 100]).astype(int)
    facts = [
        ("stage", f"{config.stage}, {config.adapter.method}"),
        ("data", f"{data.source}, task {data.task}"),
        (
            "rows",
            f"{rows} train, {len(data.test)} test; {', '.join(lost) or 'none dropped'}",
        ),
        (
            "tokens a row",
            "least {}, median {}, 90 % within {}, most {}".format(*quantiles)
            + f" (limit {config.data.max_length})",
        ),
        ("supervised", f"{data.train.supervised.mean():.1%} of the training tokens"),
    ]
    if config.is_packed:
        facts.append(("packed", f"{report.sequences} sequences of up to {config.data.max_length}"))
    return facts


def _model(report: CentralReport) -> list[tuple[str, str]]:
    config, training = report.config, report.config.training
    total = report.base_bytes + report.trained_bytes + report.activation_bytes
    return [
        ("model", f"{config.model.path}: {report.architecture}, {count_text(report.parameters)}"),
        (
            "trainable",
            f"{count_text(report.trained)} ({report.trained / report.parameters:.2%})",
        ),
        (
            "steps",
            f"{report.steps} of {training.batch_size} x {training.gradient_accumulation}"
            + (f" x {training.processes} processes" if training.processes > 1 else ""),
        ),
        (
            "memory",
            f"about {bytes_text(total)}: base {bytes_text(report.base_bytes)}, trained"
            f" {bytes_text(report.trained_bytes)}, activations"
            f" {bytes_text(report.activation_bytes)}",
        ),
        ("run", str(config.run_dir)),
    ]


def _print_example(console: Console, title: str, pieces: Sequence[tuple[str, bool]]) -> None:
    legend = Text.assemble(f"\n{title}: ", ("prompt", "dim"), " · ", ("learned", "bold green"))
    console.print(legend)
    console.print(coloured(pieces))
