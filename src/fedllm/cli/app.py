"""The commands of `fedllm`; each reads its words and leaves the work to others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import fedllm
from fedllm.cli.chat import chat
from fedllm.cli.data import data_app
from fedllm.cli.errors import nearby_examples, quiet_libraries, reported
from fedllm.cli.evaluate import evaluate
from fedllm.cli.export import export
from fedllm.cli.serve import serve
from fedllm.cli.sum_up import compare, report
from fedllm.cli.trace import trace_app
from fedllm.cli.train import check_central, train
from fedllm.config import Config
from fedllm.errors import FedLLMError, unknown
from fedllm.starting import import_transformers, uncollected

app = typer.Typer(
    name="fedllm",
    help="Federated and central fine-tuning of Hugging Face language models; chat and serving.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: fedllm check CONFIG.yaml, then fedllm run CONFIG.yaml (a federation) or"
    " fedllm train CONFIG.yaml (one machine); then fedllm chat RUN, fedllm serve RUN",
)

app.command()(train)
app.command(name="eval")(evaluate)
app.command()(report)
app.command()(compare)
app.command()(export)
app.command()(chat)
app.command()(serve)
app.add_typer(data_app, name="data")
app.add_typer(trace_app, name="trace")

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[a.b=value]...", help="Settings laid over the file."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, as runs/demo.")]


def main() -> None:
    """Run the command line; returns by `SystemExit` only."""
    quiet_libraries()
    app(prog_name="fedllm")


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"fedllm {fedllm.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Federated and central fine-tuning of Hugging Face language models; chat and serving."""


@app.command()
def run(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG.yaml", help="What to run; not with --resume."),
    ] = None,
    words: Words = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Continue this run from its last checkpoint."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load everything, print the plan, write nothing.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but the run's path at the end.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="One line a round, no live view.")] = False,
) -> None:
    """Carry out a run, or continue one."""
    console = Console()
    if resume is not None:
        with reported():
            _check_resumed(config, dry_run)
        checked = None
    else:
        with reported():
            checked = _load(config, words)
            if dry_run:
                _plan(console, checked, is_loading_model=True)
                return
    with reported(), uncollected():
        import_transformers()
        from fedllm.cli.run import choose_view, go_on, start
    view = choose_view(console, is_quiet=quiet, is_plain=plain)
    with reported(view):
        if checked is not None:
            start(checked, view, console, is_quiet=quiet)
        elif resume is not None:
            go_on(resume, view, console, is_quiet=quiet)


@app.command()
def check(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="What would be run.")],
    words: Words = None,
) -> None:
    """Check a configuration and its data, and estimate what a run takes."""
    with reported():
        if check_central(Console(), config, words):
            return
        _plan(Console(), _load(config, words), is_loading_model=False)


@app.command()
def show(
    path: RunPath,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a run was and what came of it."""
    with reported():
        from fedllm.cli.inspect import print_run, run_as_dict
        from fedllm.results import RunDir

        directory = RunDir.open(path)
        if as_json:
            typer.echo(json.dumps(run_as_dict(directory), indent=2))
        else:
            print_run(Console(), directory)


@app.command()
def bench(
    matrix: Annotated[
        str, typer.Argument(metavar="MATRIX", help="A file, or `algorithms`, which comes along.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[A.B=VALUE]...", help="Settings over those of the file."),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Where its runs go; default runs/NAME."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that run side by side.")] = 1,
) -> None:
    """Run a matrix of algorithms, settings and seeds, and sum it up in a table."""
    with reported():
        from fedllm.cli.bench import bench as carry_out
        from fedllm.experiment.matrix import load_matrix

        found = load_matrix(matrix, overrides)
        carry_out(Console(), found, to or Path("runs") / found.name, workers)


@app.command(name="list")
def list_names(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="SUBJECT",
            help="models, datasets, algorithms, metrics, partitions, codecs, robust, schedules,"
            " devices, links, worlds, stages or methods",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the names that a configuration may use."""
    with reported():
        from fedllm.cli.inspect import print_rows
        from fedllm.cli.tables import SUBJECTS

        if subject not in SUBJECTS:
            raise FedLLMError(unknown("subject", subject, SUBJECTS))
        rows = SUBJECTS[subject]()
        if as_json:
            typer.echo(json.dumps(rows, indent=2))
        else:
            print_rows(Console(), rows)


def _load(path: str | None, words: list[str] | None) -> Config:
    """Read and check a configuration; nothing heavy is imported."""
    from fedllm.experiment import load_config

    if path is None:
        raise FedLLMError(f"Give a CONFIG.yaml, or --resume DIR.{nearby_examples(Path('run'))}")
    if not Path(path).exists():
        hint = nearby_examples(Path(path))
        if "=" in path:
            raise FedLLMError(f"'{path}' is a setting; the file comes before it.{hint}")
        raise FedLLMError(f"There is no file {path}; check the path.{hint}")
    return load_config(Path(path), words or ())


def _check_resumed(config: str | None, dry_run: bool) -> None:
    if config is not None:
        raise FedLLMError(
            f"A resumed run keeps its configuration; leave '{config}' out, or start a new run"
        )
    if dry_run:
        raise FedLLMError("--dry-run is for new runs; leave out --resume or --dry-run")


def _plan(console: Console, config: Config, *, is_loading_model: bool) -> None:
    """Print what a run would be."""
    with console.status("starting") as status:
        from fedllm.cli.plan import print_report
        from fedllm.experiment.check import check, rehearse

        make = rehearse if is_loading_model else check
        report = make(config, status.update)
    print_report(console, report)
    if is_loading_model:
        console.print("dry run: everything was loaded, and no run was written", highlight=False)
