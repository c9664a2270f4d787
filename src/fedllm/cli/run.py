"""`fedllm run`: chooses a view, carries the run out and says what to do next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from fedllm.cli.course import Course
from fedllm.cli.inspect import print_next, print_run
from fedllm.cli.live import LiveView
from fedllm.cli.plain import Plain
from fedllm.config import Config
from fedllm.experiment.run import Watch, resume, run
from fedllm.results import RunDir


def choose_view(console: Console, *, is_quiet: bool, is_plain: bool) -> Course:
    """Return what shows the run: nothing, lines, or the live view where there is a terminal."""
    if is_quiet:
        return Course()
    if is_plain or not console.is_terminal:
        return Plain(console)
    return LiveView(console)


def start(config: Config, view: Course, console: Console, *, is_quiet: bool) -> None:
    """Carry out a new run."""
    _carry_out(lambda watch: run(config, watch), view, console, is_quiet)


def go_on(path: Path, view: Course, console: Console, *, is_quiet: bool) -> None:
    """Continue a run from its last checkpoint."""
    _carry_out(lambda watch: resume(path, watch), view, console, is_quiet)


def _carry_out(
    go: Callable[[Watch], RunDir], view: Course, console: Console, is_quiet: bool
) -> None:
    with view:
        directory = go(view)
    if is_quiet:
        console.print(str(directory.path), soft_wrap=True, markup=False, highlight=False)
        return
    console.print()
    print_run(console, directory, is_full=False)
    is_personal = view.parts is not None and "personal" in view.parts.scopes
    print_next(console, directory, is_personal=is_personal)
