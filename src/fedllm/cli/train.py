"""`fedllm train`: central fine-tuning from a configuration to what serving reads."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedllm.cli.errors import nearby_examples, reported, tell
from fedllm.errors import FedLLMError
from fedllm.starting import import_peft, uncollected

if TYPE_CHECKING:
    from fedllm.central.llamafactory_values import Mapped
    from fedllm.config import CentralConfig

_Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but the run's path at the end.")
]
_Plain = Annotated[bool, typer.Option("--plain", help="Lines without colours or a moving bar.")]


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG", help="Ours, or LLaMA-Factory's, YAML or JSON; not with --resume."
        ),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[a.b=value]...", help="Settings laid over the file."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Continue this run from its last checkpoint."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load everything, print the plan, write nothing.")
    ] = False,
    convert: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Write the file as one of ours, and train nothing."),
    ] = None,
    quiet: _Quiet = False,
    plain: _Plain = False,
) -> None:
    """Fine-tune a model on one machine: SFT, DPO, KTO, reward models and more."""
    console = Console(no_color=plain, force_terminal=False if plain else None)
    with reported():
        checked, found = _checked(config, words, resume, dry_run)
        if found is not None and not quiet:
            print_mapped(console, found)
        if convert is not None:
            _convert(console, checked, convert)
            return
        if dry_run:
            _plan(console, checked)
            return
        if _spawned(checked, config, words, resume, quiet=quiet, plain=plain):
            return
    _carry_out(console, checked, resume, quiet)


def check_central(console: Console, config: str, words: list[str] | None) -> bool:
    """Print what a run would be, no weight being loaded, if the file is of a central run."""
    from fedllm.central.llamafactory import is_llamafactory
    from fedllm.config import is_central, read

    if not Path(config).is_file():
        return False
    tree = read(Path(config))
    if not (is_central(tree) or is_llamafactory(tree)):
        return False
    checked, found = _checked(config, words, None, dry_run=False)
    if found is not None:
        print_mapped(console, found)
    with console.status("starting") as status:
        from fedllm.central.check import check
        from fedllm.cli.central import print_report

        report = check(checked, status.update)
    print_report(console, report)
    return True


@uncollected()
def _checked(
    config: str | None, words: list[str] | None, resume: Path | None, dry_run: bool
) -> tuple[CentralConfig, Mapped | None]:
    """Read the configuration, of a file or of the run to go on with."""
    if resume is not None:
        if config is not None or dry_run:
            told = f"'{config}'" if config is not None else "--dry-run"
            raise FedLLMError(f"A resumed run keeps its configuration; leave {told} out")
        from fedllm.central.run_config import config_of

        return config_of(resume), None
    if config is None:
        hint = nearby_examples(Path("train"))
        raise FedLLMError(f"Give a CONFIG.yaml, or --resume DIR.{hint}")
    if not Path(config).exists():
        hint = nearby_examples(Path(config))
        raise FedLLMError(f"There is no file {config}; check the path.{hint}")
    from fedllm.central.configure import load_central

    return load_central(Path(config), words or ())


def _spawned(
    checked: CentralConfig,
    config: str | None,
    words: list[str] | None,
    resume: Path | None,
    *,
    quiet: bool,
    plain: bool,
) -> bool:
    """Start the processes that are asked for, unless this is one of them."""
    import os

    if checked.training.processes == 1 or "WORLD_SIZE" in os.environ:
        return False
    from fedllm.central.processes import launch

    source = ["--resume", str(resume)] if resume is not None else [str(config), *(words or ())]
    flags = [*(["--quiet"] if quiet else []), *(["--plain"] if plain else [])]
    code = launch(checked.training.processes, ["train", *source, *flags])
    if code:
        raise typer.Exit(code)
    return True


def _carry_out(
    console: Console, checked: CentralConfig, resume: Path | None, is_quiet: bool
) -> None:
    """Train, and say where the result is and how to go on."""
    with reported(), uncollected():
        import_peft()
        from fedllm.central.processes import is_first
        from fedllm.central.run import resume as go_on
        from fedllm.central.run import train as start
        from fedllm.cli.central import CentralView, print_end

        gc.freeze()  # modules stay to the end; no later search need walk over them
        view = CentralView(console, is_silent=is_quiet or not is_first())
    try:
        with reported(), view, uncollected():
            done = go_on(resume, view) if resume is not None else start(checked, view)
            if is_first():
                print_end(console, done, checked, is_quiet=is_quiet)
    except typer.Exit:
        if view.path is not None:
            tell(f"continue with: fedllm train --resume {view.path}", "yellow")
        raise


def _convert(console: Console, checked: CentralConfig, file: Path) -> None:
    from fedllm.config import dump
    from fedllm.results.storage import explained, write_text

    if file.exists():
        raise FedLLMError(f"{file} exists and is not overwritten; give another name")
    with explained(file, "Nothing was changed."):
        write_text(file, dump(checked))
    console.print(f"written to {file}; run it with: fedllm train {file}", soft_wrap=True)


def _plan(console: Console, checked: CentralConfig) -> None:
    with console.status("starting") as status:
        from fedllm.central.check import rehearse
        from fedllm.cli.central import print_report

        report = rehearse(checked, status.update)
    print_report(console, report)
    console.print("dry run: everything was loaded, and no run was written", highlight=False)


def print_mapped(console: Console, found: Mapped) -> None:
    """Print what becomes of LLaMA-Factory's keys."""
    told: Mapping[str, Any] = found.honoured
    console.print("a file of LLaMA-Factory's; its keys set", highlight=False)
    for key, place in told.items():
        console.print(f"  {key} -> {place}", highlight=False, markup=False, soft_wrap=True)
    if found.ignored:
        console.print("without effect", highlight=False)
    for key, why in found.ignored.items():
        console.print(f"  {key}: {why}", highlight=False, markup=False, soft_wrap=True)
