"""`fedllm trace`: imports, inspects, makes up and draws traces of availability."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from fedllm.cli.errors import reported
from fedllm.cli.figures import duration_text

trace_app = typer.Typer(
    help="Import, inspect, make up and draw traces of when clients are there.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_HOURS = 24
_DAYS = 7
"""Days at the beginning of a trace over which `inspect` takes the mean."""
_DRAWN, _STEPS = 40, 240
"""Clients, and moments, that `plot` draws."""
_DAY_S, _HOUR_S = 86400.0, 3600.0

File = Annotated[Path, typer.Argument(metavar="FILE", help="A trace.")]
Format = Annotated[
    Literal["auto", "flash", "fedscale", "plato", "ours"],
    typer.Option("--format", help="Format of the file; auto looks at how it begins."),
]
PolicyOption = Annotated[
    Literal["flash", "reference"],
    typer.Option("--policy", help="For FLASH: when a phone counts as there."),
]
TimeZone = Annotated[
    str,
    typer.Option("--time-zone", metavar="ZONE", help="For FLASH: where its clocks stand."),
]
Malformed = Annotated[
    float,
    typer.Option("--malformed", min=0.0, max=1.0, help="Largest share of lines that may be wrong."),
]


@trace_app.command(name="import")
def import_file(
    file: File,
    to: Annotated[Path, typer.Option("--to", metavar="OUT", help="A new .jsonl or .parquet.")],
    kind: Format = "auto",
    policy: PolicyOption = "flash",
    time_zone: TimeZone = "UTC",
    unknown: Annotated[
        Literal["wrap", "available", "unavailable"] | None,
        typer.Option("--unknown", help="What holds where nothing is known of a client."),
    ] = None,
    malformed: Malformed = 0.05,
) -> None:
    """Turn a trace of another program into our own format."""
    console = Console()
    with reported():
        from fedllm.system.traces import import_trace, write_record

        record, problems = import_trace(
            file, kind, policy=policy, time_zone=time_zone, unknown=unknown, malformed=malformed
        )
        write_record(record, to)
        _tell_problems(console, problems)
        console.print(f"{to}: {_counts(record)}", highlight=False, soft_wrap=True)


@trace_app.command()
def inspect(
    file: File,
    kind: Format = "auto",
    policy: PolicyOption = "flash",
    time_zone: TimeZone = "UTC",
    malformed: Malformed = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a trace holds: clients, windows, and who is there at which hour."""
    with reported():
        from fedllm.system.traces import import_trace

        record, problems = import_trace(
            file, kind, policy=policy, time_zone=time_zone, malformed=malformed
        )
        found = _described(record, problems)
        if as_json:
            typer.echo(json.dumps(found, indent=2))
        else:
            _print(Console(), record, problems, found)


@trace_app.command()
def generate(
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="A new file.")],
    kind: Annotated[
        Literal["ours", "flash", "fedscale", "fedscale-capacity", "plato"],
        typer.Option("--format", help="Format to write."),
    ] = "ours",
    behaviour: Annotated[
        Literal["overnight", "office", "random"], typer.Option(help="When clients are there.")
    ] = "overnight",
    clients: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    days: Annotated[int, typer.Option(min=1, help="How many.")] = 7,
    seed: Annotated[int, typer.Option(min=0, help="Root of all draws.")] = 0,
) -> None:
    """Make a trace up."""
    with reported():
        from fedllm.system.traces import generate as make
        from fedllm.system.traces import write_as

        record = make(clients, days, behaviour, seed)
        write_as(record, kind, to)
        Console().print(f"{to}: {_counts(record)}", highlight=False, soft_wrap=True)


@trace_app.command()
def plot(
    file: File,
    to: Annotated[Path, typer.Option("--to", metavar="PNG", help="A new picture.")],
    kind: Format = "auto",
    policy: PolicyOption = "flash",
    time_zone: TimeZone = "UTC",
    malformed: Malformed = 0.05,
) -> None:
    """Draw the windows of some clients, and how many are there over time."""
    with reported():
        from fedllm.errors import DataError
        from fedllm.results.trace_plot import plot_trace
        from fedllm.system.traces import import_trace, make_way

        if to.suffix != ".png":
            raise DataError(f"{to}: pictures are written as .png; choose such a name")
        make_way(to)
        record, _ = import_trace(
            file, kind, policy=policy, time_zone=time_zone, malformed=malformed
        )
        trace = record.trace()
        if not trace.num_windows:
            raise DataError(f"{file} holds no window, so there is nothing to draw")
        span = trace.span_s
        drawn = {
            str(trace.names[index]): [(low, min(high, span)) for low, high in trace.listed(index)]
            for index in range(min(trace.num_clients, _DRAWN))
        }
        times = [span * step / _STEPS for step in range(_STEPS)]
        plot_trace(drawn, times, trace.share_available(times), to)
        typer.echo(str(to))


def _counts(record: Any) -> str:
    windows = sum(len(own) for own in record.windows.values())
    told = f"{len(record.windows)} clients, {windows} windows, {duration_text(record.span_s)}"
    if record.capacities:
        told += f", {len(record.capacities)} capacities"
    return told + (f", {len(record.links)} links" if record.links else "")


def _described(record: Any, problems: Any) -> dict[str, Any]:
    trace = record.trace()
    lengths = sorted(high - low for own in record.windows.values() for low, high in own)
    hours = []
    days = max(int(record.span_s // _DAY_S), 1)
    if record.windows:
        for hour in range(_HOURS):
            times = [day * _DAY_S + (hour + 0.5) * _HOUR_S for day in range(min(days, _DAYS))]
            found = trace.share_available(times)
            hours.append(sum(found) / len(found))
    return {
        "source": record.source,
        "origin": record.origin,
        "clients": len(record.windows),
        "span_s": record.span_s,
        "wraps": record.wraps,
        "unknown": record.unknown,
        "windows": len(lengths),
        "median_window_s": lengths[len(lengths) // 2] if lengths else None,
        "clients_never_there": sum(not own for own in record.windows.values()),
        "share_available_by_hour": hours,
        "capacities": len(record.capacities),
        "links": len(record.links),
        "lines": problems.lines,
        "malformed": problems.count,
        "unknown_events": dict(problems.unknown_events),
    }


def _print(console: Console, record: Any, problems: Any, found: dict[str, Any]) -> None:
    console.print(_counts(record), highlight=False)
    if found["median_window_s"] is not None:
        told = f"half of the windows are longer than {duration_text(found['median_window_s'])}"
        never = found["clients_never_there"]
        console.print(told + (f"; {never} clients are never there" if never else ""))
    rows = Table.grid(padding=(0, 2))
    for hour, share in enumerate(found["share_available_by_hour"]):
        rows.add_row(f"{hour:02d}:00", f"{share:4.0%}", "█" * round(40 * share))
    if found["share_available_by_hour"]:
        since = f" from {record.origin}" if record.origin else " of the trace"
        told = f"\nshare of the clients that is there, by hour{since}:"
        console.print(told, highlight=False, soft_wrap=True)
        console.print(rows)
    _tell_problems(console, problems)


def _tell_problems(console: Console, problems: Any) -> None:
    if problems.count:
        console.print(
            f"{problems.count} of {problems.lines} lines cannot be read and are left out:"
        )
        for line in problems.named:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        if problems.count > len(problems.named):
            console.print(f"  ... and {problems.count - len(problems.named)} more")
    for event, count in problems.unknown_events.most_common(10):
        told = f"event {event!r} is not known, and changes nothing: {count} lines"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
