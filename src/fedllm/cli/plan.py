"""Prints what a run would be: data, clients, model, memory, bytes, time and one example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm.cli.figures import bytes_text, count_text, duration_text
from fedllm.cli.inspect import new_table
from fedllm.cli.plain import partition_text

if TYPE_CHECKING:
    from fedllm.experiment.check import Example, Report

_MAX_CLIENTS = 20
_QUANTILES = {"least": 0, "25 %": 25, "median": 50, "75 %": 75, "most": 100}
_MAX_CHARACTERS = 1500


def print_report(console: Console, report: Report) -> None:
    """Print all of it."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for name, text in (*_data(report), *_model(report), *_cost(report), *_world(report)):
        facts.add_row(name, text)
    console.print(facts, highlight=False)
    console.print(_clients(report))
    _print_example(console, report.example)


def _data(report: Report) -> list[tuple[str, str]]:
    data = report.dataset
    train, test = data.train, data.test
    lost = [f"{count} dropped ({why})" for why, count in data.dropped.items()]
    lost += [f"{data.truncated} shortened"] if data.truncated else []
    quantiles = np.percentile(train.lengths, [0, 50, 90, 100]).astype(int)
    facts = [
        ("data", f"{data.source}, task {data.task}"),
        ("rows", f"{len(train)} train, {len(test)} test; {', '.join(lost) or 'none dropped'}"),
        (
            "tokens a row",
            "least {}, median {}, 90 % within {}, most {}".format(*quantiles)
            + f" (limit {report.config.data.max_length})",
        ),
    ]
    if train.supervised.any():
        facts.append(("supervised", f"{train.supervised.mean():.1%} of the training tokens"))
    if data.label_names:
        facts.append(("labels", _labels(report)))
    return facts


def _labels(report: Report) -> str:
    data = report.dataset
    assert data.train.labels is not None
    counts = np.bincount(data.train.labels, minlength=len(data.label_names))
    pairs = [f"{name} {count}" for name, count in zip(data.label_names, counts, strict=True)]
    more = f", + {len(pairs) - 12} more" if len(pairs) > 12 else ""
    return ", ".join(pairs[:12]) + more


def _model(report: Report) -> list[tuple[str, str]]:
    size, config = report.size, report.config
    trained = size.adapter_parameters + size.head_parameters
    kinds = sorted({name.rpartition(".")[2] for name in size.target_names})
    layers = f"{len(size.target_names)} layers ({', '.join(kinds)})"
    head = f" + head of {count_text(size.head_parameters)}" if size.head_parameters else ""
    up_to = "up to " if len(report.ranks) > 1 else ""
    return [
        ("model", f"{config.model.path}: {size.architecture}, {count_text(size.parameters)}"),
        (
            "adapter",
            f"{config.algorithm.name}, rank {up_to}{config.adapter.max_rank} on {layers}{head}:"
            f" {count_text(trained)} trainable ({trained / size.parameters:.2%})",
        ),
        *([("ranks", _ranks(report))] if up_to else []),
    ]


def _ranks(report: Report) -> str:
    """Return how many clients have each rank."""
    counted, clients = sum(report.ranks.values()), report.config.federation.num_clients
    of = f"the first {counted}" if counted < clients else f"{clients}"
    shown = ", ".join(f"{rank} for {count}" for rank, count in report.ranks.items())
    return f"{shown} of {of} clients"


def _cost(report: Report) -> list[tuple[str, str]]:
    memory, traffic, time = report.memory, report.traffic, report.duration
    federation, steps = report.config.federation, report.steps
    span = f"{steps.min()} to {steps.max()}" if steps.min() < steps.max() else f"{steps[0]}"
    grows = " and growing, as the base travels" if traffic.grows else ""
    return [
        (
            "rounds",
            f"{federation.rounds}, with {federation.cohort} of {federation.num_clients} clients;"
            f" {span} local steps each",
        ),
        (
            "bytes a round",
            f"up {bytes_text(traffic.up_bytes)}, down {bytes_text(traffic.down_bytes)}"
            f" (mean of {traffic.rounds_played}{grows})",
        ),
        (
            "memory",
            f"about {bytes_text(memory.total_bytes)}: base {bytes_text(memory.base_bytes)},"
            f" {memory.clients_in_a_pass} clients in a pass {bytes_text(memory.buffer_bytes)},"
            f" activations of {memory.tokens_in_a_pass} tokens"
            f" {bytes_text(memory.activation_bytes)}; without the libraries' own",
        ),
        (
            "time",
            f"roughly {duration_text(time.total_s)}: {duration_text(time.round_s)} a round,"
            f" {duration_text(time.evaluation_s)} for each of {time.evaluations} evaluations.\n"
            f"{count_text(time.tokens_per_round)} tokens a round at"
            f" {count_text(time.flops_per_token)}FLOP each, on a machine that multiplies at"
            f" {count_text(time.matmul_flops_per_s)}FLOP/s right now, a quarter of which is"
            " counted on. It may be off by a factor of three.",
        ),
    ]


def _world(report: Report) -> list[tuple[str, str]]:
    """Tell realistic mode: when the server aggregates, and what clients have."""
    config, world = report.config, report.world
    if world is None:
        return []
    whole = world.looked_at
    counted = [
        ", ".join(f"{name} {count / whole:.0%}" for name, count in kinds.items())
        for kinds in (world.devices, world.links)
    ]
    left_out = f"; {world.excluded} left out, too small" if world.excluded else ""
    train, transfer = (" / ".join(map(duration_text, p)) for p in (world.train_s, world.transfer_s))
    return [
        ("schedule", f"{config.federation.schedule.name}; {world.there_at_start:.0%} of the clients"
                     " are there at the start"),
        ("devices", counted[0] + left_out),
        ("links", counted[1]),
        ("a job", f"trains {train} and transfers {transfer} (10 / 50 / 90 % of clients)"),
    ]  # fmt: skip


def _clients(report: Report) -> Table:
    mix = report.heterogeneity
    title = f"clients: {partition_text(report.config.federation.partition)}"
    if mix.group_names:
        title += f", mean distance {mix.mean_distance:.2f} (0 alike, 1 nothing in common)"
    columns = {"train rows": mix.train_sizes, "test rows": mix.test_sizes, "steps": report.steps}
    figures = {name: [f"{v:.0f}" for v in _seen(v)] for name, v in columns.items()}
    if mix.group_names:
        figures["distance"] = [f"{v:.2f}" for v in _seen(mix.distances)]
        figures["effective groups"] = [f"{v:.1f}" for v in _seen(mix.effective_groups)]
    few = len(mix.train_sizes) <= _MAX_CLIENTS
    table = new_table("client" if few else "of clients", *figures, title=title)
    names = [str(cid) for cid in range(len(mix.train_sizes))] if few else list(_QUANTILES)
    if few and mix.group_names:
        table.add_column("mostly", no_wrap=True)
        figures["mostly"] = [_mostly(mix.group_names, counts) for counts in mix.counts]
    for name, *cells in zip(names, *figures.values(), strict=True):
        table.add_row(name, *cells)
    return table


def _seen(values: np.ndarray) -> np.ndarray:
    """Return the values of few clients, and the quantiles of many."""
    if len(values) <= _MAX_CLIENTS:
        return values
    return np.asarray(np.percentile(values, list(_QUANTILES.values())))


def _mostly(names: tuple[str, ...], counts: np.ndarray) -> str:
    """Return a client's two largest groups with their shares."""
    largest = np.argsort(-counts, kind="stable")[:2]
    total = max(int(counts.sum()), 1)
    return ", ".join(f"{names[i]} {counts[i] / total:.0%}" for i in largest if counts[i])


def _print_example(console: Console, example: Example) -> None:
    legend = Text.assemble(
        (f"training row {example.row} as the model sees it, {example.num_tokens} tokens: ", "bold"),
        ("prompt", "dim"),
        " · ",
        *([f"label {example.label}"] if example.label else [("learned", "bold green")]),
    )
    console.print(legend)
    console.print(coloured(example.pieces))
    if example.worse:
        console.print(Text("the same row with the worse answer:", style="bold"))
        console.print(coloured(example.worse))


def coloured(pieces: Sequence[tuple[str, bool]]) -> Text:
    """Return a row as the model sees it, what is learned standing out; its middle may be cut."""
    text = Text()
    for piece, is_supervised in pieces:
        text.append(piece, style="bold green" if is_supervised else "dim")
    if len(text) > _MAX_CHARACTERS:
        return Text.assemble(text[: _MAX_CHARACTERS // 2], " ... ", text[-_MAX_CHARACTERS // 2 :])
    return text
