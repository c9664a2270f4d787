"""A run from start, or from its last checkpoint, to its end."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from fedllm.config import Config, dump
from fedllm.data import heterogeneity
from fedllm.errors import RunError
from fedllm.evaluation import Evaluation
from fedllm.experiment.configure import load_config
from fedllm.experiment.exchange import epsilon_of
from fedllm.experiment.execution import close_executor
from fedllm.experiment.outputs import personal_clients, write_adapter
from fedllm.experiment.parts import Parts, build
from fedllm.federation import Codec, Update
from fedllm.results import (
    RunDir,
    is_central_run,
    latest_checkpoint,
    load_checkpoint,
    resume_command,
    save_checkpoint,
)
from fedllm.results.run_log import logging_to
from fedllm.simulation import STATE_TYPES, Round

CODEC = Codec(*STATE_TYPES)
"""The types a checkpoint may hold."""

logger = logging.getLogger(__name__)


class Watch(Protocol):
    """Told how a run goes on; every method may do nothing."""

    def say(self, text: str) -> None:
        """Tell what is being done."""

    def begin(self, parts: Parts, run: RunDir) -> None:
        """Tell that everything is loaded."""

    def step(self, cid: int, done: int, total: int) -> None:
        """Tell a client's progress in local steps."""

    def answered(self, count: int) -> None:
        """Tell how many answers an evaluation has generated."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Tell a round's metrics, as they go to metrics.jsonl."""


def run(config: Config, watch: Watch) -> RunDir:
    """Carry out a new run.

    Raises:
        RunError: If the run directory exists.
        FedLLMError: If something the user can mend is wrong.
    """
    if config.run_dir.exists():
        RunDir.create(config.run_dir, "")  # says that it exists, before anything is loaded
    parts = build(config, watch.say)
    with RunDir.create(config.run_dir, dump(config)) as directory, logging_to(directory):
        _Session(parts, directory, watch).carry_on()
        return directory


def resume(path: Path, watch: Watch) -> RunDir:
    """Continue a run from its last checkpoint, as if nothing had happened.

    Raises:
        RunError: If there is no run at `path`, or another process works on it.
    """
    directory = RunDir.open(path)
    if is_central_run(path):
        raise RunError(f"{path} is a central run. Continue it with: {resume_command(path)}")
    directory.lock()
    config = load_config(path / "config.yaml")
    with directory, logging_to(directory):
        parts = build(config, watch.say)
        session = _Session(parts, directory, watch)
        session.restore()
        session.carry_on()
        return directory


def restored(path: Path, watch_say: Any = lambda text: None) -> tuple[Parts, RunDir]:
    """Load a run at its last checkpoint, to evaluate or export it.

    Raises:
        RunError: If there is no run, or it has no checkpoint yet.
    """
    directory = RunDir.open(path)
    checkpoint = latest_checkpoint(directory)
    if checkpoint is None:
        raise RunError(f"{path} has no checkpoint yet; finish it with: fedllm run --resume {path}")
    parts = build(load_config(path / "config.yaml"), watch_say)
    tree, tensors = load_checkpoint(checkpoint)
    parts.loop.restore(CODEC.unpack(tree["loop"], tensors))
    return parts, directory


class _Session:
    """One process's part of a run."""

    def __init__(self, parts: Parts, directory: RunDir, watch: Watch) -> None:
        self.parts, self.directory, self.watch = parts, directory, watch
        self.totals = {"up": 0, "down": 0, "energy_j": 0.0}
        parts.loop.executor.progress = watch.step  # type: ignore[attr-defined]

    def restore(self) -> None:
        """Go back to the last checkpoint; without one, to the very beginning."""
        checkpoint = latest_checkpoint(self.directory)
        if checkpoint is None:
            self.directory.truncate(dict.fromkeys(self.directory.lengths(), 0))
            return
        tree, tensors = load_checkpoint(checkpoint)
        self.parts.loop.restore(CODEC.unpack(tree["loop"], tensors))
        self.totals = dict(tree["totals"])
        self.directory.truncate(tree["lengths"])
        logger.info("resumed after round %d", self.parts.server.version)

    def carry_on(self) -> None:
        """Do what is left of the run."""
        parts, rounds = self.parts, self.parts.config.federation.rounds
        self.watch.begin(parts, self.directory)
        if parts.server.version == 0:
            self.directory.truncate(dict.fromkeys(self.directory.lengths(), 0))
            report = heterogeneity(parts.partition, parts.dataset.train.groups).as_dict()
            self.directory.write("heterogeneity.json", json.dumps(report, indent=2) + "\n")
            if parts.config.evaluation.every:
                start = {"round": 0, "virtual_time_s": 0.0}
                self._record(start, self._evaluate(0, is_last=False), {})
        try:
            for made in parts.loop.run(rounds):
                self._finish(made)
        finally:
            close_executor(parts.loop.executor)
        self._draw()

    def _finish(self, made: Round) -> None:
        """Evaluate, record and save one round."""
        sums = {key: sum(made.ledger.column(key)) for key in _SUMMED}
        self.totals["up"] += sums["up_bytes"]
        self.totals["down"] += sums["down_bytes"]
        self.totals["energy_j"] += sums["energy_j"]
        every = self.parts.config.evaluation.every
        is_due = made.is_last or bool(every and made.number % every == 0)
        evaluation = self._evaluate(made.number, is_last=made.is_last) if is_due else None
        record = {
            "round": made.number,
            "virtual_time_s": made.time_s,
            "train": _training(made.updates),
            "agg_error": made.agg_error,
            "rejected": list(made.rejected),
            "jobs": made.outcomes,
            "staleness": _spread(made.staleness),
            "in_flight": made.in_flight,
            "bytes": {
                "up": sums["up_bytes"],
                "down": sums["down_bytes"],
                "up_total": self.totals["up"],
                "down_total": self.totals["down"],
            },
            "energy_j": sums["energy_j"],
            "energy_total_j": self.totals["energy_j"],
        }
        if made.ended:
            record["ended"] = made.ended
            logger.warning("round %d: the run ends: %s", made.number, made.ended)
        self.directory.append("events", made.events)
        self.directory.append("ledger", made.ledger)
        if self.parts.config.updates.privacy is not None:
            record["privacy"] = self._privacy(made.number)
        self._record(record, evaluation, made.wall_s)
        if made.is_last or made.number % self.parts.config.checkpoint.every == 0:
            self._save(made.number, is_last=made.is_last)

    def _privacy(self, rounds: int) -> dict[str, Any]:
        """Return what may be claimed so far."""
        population = int((self.parts.partition.train_sizes > 0).sum())
        spent = epsilon_of(self.parts.config, self.parts.server, rounds, population)
        assert spent is not None
        return asdict(spent)

    def _evaluate(self, number: int, *, is_last: bool) -> Evaluation:
        parts = self.parts
        begin = time.perf_counter()
        found = parts.evaluator.evaluate(
            parts.server,
            parts.loop.store,
            parts.scopes,
            sample=not is_last,
            progress=self.watch.answered,
        )
        self._evaluation_s = time.perf_counter() - begin
        if is_last and found.predictions:
            lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in found.predictions)
            self.directory.write(f"predictions/{number}.jsonl", "".join(lines))
        return found

    def _record(
        self, record: dict[str, Any], evaluation: Evaluation | None, wall_s: Mapping[str, float]
    ) -> None:
        record["main_metric"] = self.parts.evaluator.names[0]
        took = dict(wall_s)
        if evaluation is not None:
            record["eval"] = evaluation.record
            took["evaluate"] = self._evaluation_s
        self.directory.append("metrics", [record])
        tokens = record.get("train", {}).get("tokens", 0)
        timing = {"round": record["round"], "wall_s": sum(took.values()), **took}
        if took.get("train"):
            timing["tokens_per_s"] = tokens / took["train"]
        self.directory.append("timing", [timing])
        self.watch.record(record)

    def _save(self, version: int, *, is_last: bool) -> None:
        """Save everything the run needs to go on, and the adapters for everybody else."""
        parts = self.parts
        packed, tensors = CODEC.pack(parts.loop.state())
        tree = {"loop": packed, "totals": self.totals, "lengths": self.directory.lengths()}

        def write(folder: Path) -> None:
            write_adapter(parts, folder / "adapter")
            if is_last:
                for cid in personal_clients(parts):
                    write_adapter(parts, folder / "clients" / str(cid) / "adapter", cid)

        keep = parts.config.checkpoint.keep
        save_checkpoint(self.directory, version, tree, tensors, keep=keep, write=write)

    def _draw(self) -> None:
        from fedllm.results.plots import plot_run

        self.watch.say("drawing")
        plot_run(self.directory)


_SUMMED = ("up_bytes", "down_bytes", "energy_j")


def _spread(lateness: Sequence[int]) -> dict[str, float] | None:
    """Return how late updates were, in versions; None without any."""
    if not lateness:
        return None
    return {"mean": sum(lateness) / len(lateness), "max": max(lateness)}


def _training(updates: list[Update] | Any) -> dict[str, Any]:
    """Return what the cohort's local training found."""
    clients = [
        {
            "client": u.cid,
            "loss": u.metrics.get("loss", math.nan),
            "steps": u.num_steps,
            "samples": u.num_samples,
        }
        for u in updates
    ]
    weights = [u.num_samples for u in updates]
    losses = [c["loss"] * w for c, w in zip(clients, weights, strict=True)]
    return {
        "loss": sum(losses) / max(sum(weights), 1),
        "tokens": sum(u.metrics.get("tokens", 0.0) for u in updates),
        "clients": clients,
    }
