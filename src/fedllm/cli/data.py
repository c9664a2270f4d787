"""`fedllm data check`: a verdict on every row of a data set before anything is trained on it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.text import Text

from fedllm.cli.errors import reported
from fedllm.cli.inspect import new_table
from fedllm.errors import ConfigError, FedLLMError

if TYPE_CHECKING:
    from fedllm.config import Config
    from fedllm.data.verdicts import DataCheck

data_app = typer.Typer(
    help="Look at data before it is learned from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_BARS, _BAR_WIDTH = 12, 40
_SHOWN = 10
_SOME_BROKEN = 1


@data_app.callback()
def _data() -> None:
    """Look at data before it is learned from."""


PathWord = Annotated[
    str | None,
    typer.Argument(metavar="[PATH]", help="File, folder, hub id, or a name in the registry."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Take model and data settings from there."),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Whose tokenizer and chat template; default builtin:tiny."),
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=1, help="Longest row in tokens."),
]
Registry = Annotated[
    Path | None,
    typer.Option("--registry", metavar="DIR", help="Folder with a dataset_info.json."),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write every verdict there."),
]


@data_app.command()
def check(
    path: PathWord = None,
    config: ConfigFile = None,
    model: ModelName = None,
    max_length: MaxLength = None,
    registry: Registry = None,
    save: JsonFile = None,
) -> None:
    """Read every row: is it ok, mended, too long or broken, where, why, and what to do."""
    console = Console()
    with reported():
        words = {"path": path, "max_length": max_length}
        words["registry"] = None if registry is None else str(registry)
        settings = _settings(config, words, model)
        from fedllm.data.verdicts import check_data
        from fedllm.models import load_tokenizer

        with console.status("reading every row"):
            found = check_data(
                settings.data,
                load_tokenizer(settings.model),  # type: ignore[arg-type]  # it fits the protocol
                template=settings.model.chat_template,
            )
        _print(console, found)
        if save is not None:
            _save(save, found)
            console.print(f"saved to {save}", soft_wrap=True, highlight=False)
        if found.totals["broken"]:
            raise typer.Exit(_SOME_BROKEN)


def _settings(file: Path | None, words: dict[str, Any], model: str | None) -> Config:
    """Return a configuration of which model and data are used."""
    from fedllm.config import read, validate

    if file is None and words["path"] is None:
        raise FedLLMError("Give a PATH to check, or --config FILE that has one in data.path")
    tree = read(file) if file is not None else {}
    data = {**(tree.get("data") or {}), **{k: v for k, v in words.items() if v is not None}}
    about_model = {**(tree.get("model") or {}), **({} if model is None else {"path": model})}
    found, problems = validate({"data": data, "model": about_model})
    if found is None:
        raise ConfigError(problems, None if file is None else str(file))
    return found


def _print(console: Console, found: DataCheck) -> None:
    totals = ", ".join(f"{count} {verdict}" for verdict, count in found.totals.items())
    console.print(f"{found.source}: task {found.task}", soft_wrap=True, highlight=False)
    console.print(f"{len(found.rows)} rows: {totals}", soft_wrap=True, highlight=False)
    _print_reasons(console, found)
    if found.lengths:
        _print_lengths(console, found)
        console.print(f"supervised: {found.supervised_share:.1%} of the tokens", highlight=False)
    if found.example:
        from fedllm.cli.plan import coloured

        console.print("a row of ordinary length, what is learned of it in green:")
        console.print(coloured(found.example))


def _print_reasons(console: Console, found: DataCheck) -> None:
    """Print the first rows of each reason, and how many there are."""
    reasons = dict.fromkeys((row.verdict, row.reason) for row in found.rows if row.reason)
    for verdict, reason in sorted(reasons):
        rows = [row for row in found.rows if (row.verdict, row.reason) == (verdict, reason)]
        style = "red" if verdict == "broken" else "yellow"
        why = "" if reason == verdict else f", {reason}"
        head = Text.assemble((verdict, style), f"{why}: {len(rows)}")
        console.print(head, highlight=False)
        shown = rows[:_SHOWN] if verdict == "broken" else rows[:1]
        for row in shown:
            remedy = f". {row.remedy}" if row.remedy else ""
            line = Text(f"  {row.where}: {row.what}{remedy}")
            console.print(line, soft_wrap=True, highlight=False)
        if len(rows) > len(shown):
            console.print(f"  and {len(rows) - len(shown)} more", highlight=False)


def _print_lengths(console: Console, found: DataCheck) -> None:
    lengths = np.array(found.lengths)
    counts, edges = np.histogram(lengths, bins=min(_BARS, max(len(set(found.lengths)), 1)))
    table = new_table("tokens", "rows", title="length of rows")
    table.add_column("", no_wrap=True)
    for count, first, last in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * round(_BAR_WIDTH * count / counts.max())
        table.add_row(f"{first:.0f}-{last:.0f}", str(count), bar or ("▏" if count else ""))
    console.print(table)
    p50, p95, most = np.percentile(lengths, [50, 95, 100]).astype(int)
    console.print(
        f"p50 {p50}, p95 {p95}, most {most}; max_length is {found.max_length}, and "
        f"{found.suggested_length} would hold 99 % of the rows",
        soft_wrap=True,
        highlight=False,
    )


def _save(path: Path, found: DataCheck) -> None:
    tree = {
        "source": found.source,
        "task": found.task,
        "max_length": found.max_length,
        "suggested_length": found.suggested_length,
        "supervised_share": found.supervised_share,
        "totals": dict(found.totals),
        "rows": [asdict(row) for row in found.rows],
    }
    try:
        path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise FedLLMError(f"{path} cannot be written: {error}. Choose another place") from None
