"""One line a round, for files, pipes and those who like it so."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedllm.cli.course import Course
from fedllm.cli.figures import bytes_text, duration_text, value_text

if TYPE_CHECKING:
    from fedllm.experiment.parts import Parts
    from fedllm.results import RunDir


class Plain(Course):
    """Prints a line for each thing that is done and each round."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def say(self, text: str) -> None:
        """Print what is being done."""
        super().say(text)
        self._print(f"{text} ...")

    def begin(self, parts: Parts, run: RunDir) -> None:
        """Print what the run is."""
        super().begin(parts, run)
        self._print(title(parts))

    def record(self, record: Mapping[str, Any]) -> None:
        """Print a round."""
        took = time.monotonic() - self.round_began_s
        super().record(record)
        words = [f"round {record['round']}/{self.rounds}"]
        evaluated = self.main_values()
        if evaluated and evaluated[-1][0] == record["round"]:
            words.append(f"{self.main_metric} {value_text(evaluated[-1][1])}")
            words.append(f"best {value_text(self.best()[1])}")
        if "train" in record:
            words.append(f"train loss {value_text(record['train']['loss'])}")
        if "bytes" in record:
            sent = record["bytes"]
            words.append(f"up {bytes_text(sent['up'])}, down {bytes_text(sent['down'])}")
        if self.parts is not None and self.parts.config.mode == "realistic":
            words += _world_words(record)
        if record.get("rejected"):
            words.append(f"{len(record['rejected'])} rejected")  # the log has told why
        words.append(duration_text(took))
        self._print("  ".join(words))

    def _print(self, text: str) -> None:
        # a line stays a line, however narrow the terminal is taken to be
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)


def _world_words(record: Mapping[str, Any]) -> list[str]:
    """Return what a round was in virtual time: when, how late its updates, and what was lost."""
    words = [f"at {duration_text(record['virtual_time_s'])}"]
    late = record.get("staleness")
    if late and late["max"]:
        words.append(f"{late['mean']:.1f} versions late")
    lost = {k: n for k, n in record.get("jobs", {}).items() if k not in ("arrived", "rejected")}
    if lost:
        words.append("lost " + ", ".join(f"{count} by {why}" for why, count in lost.items()))
    if record.get("ended"):
        words.append(f"ended: {record['ended']}")
    return words


def title(parts: Parts) -> str:
    """Return a run in one line."""
    config = parts.config
    federation = config.federation
    clients = f"{federation.num_clients} clients"
    is_stream = federation.schedule.name in ("buffered", "async")
    if federation.cohort < federation.num_clients:
        clients += f", {federation.cohort} {'at work' if is_stream else 'a round'}"
    named = (config.name, config.algorithm.name, config.model.path, config.data.source, clients)
    words = [*named, partition_text(config.federation.partition)]
    if federation.schedule.name != "sync":
        words.append(federation.schedule.name)
    return " · ".join(words)


def partition_text(partition: Any) -> str:
    """Return a partition with the setting that matters to it."""
    match partition.name:
        case "dirichlet" | "quantity" | "topic":
            return f"{partition.name}({partition.alpha:g})"
        case "shards":
            return f"shards({partition.shards_per_client})"
        case "column":
            return f"by column {partition.by}"
        case name:
            return str(name)
