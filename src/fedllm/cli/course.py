"""What is known of a run while it goes on; the views are drawn from it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fedllm.cli.figures import duration_text
from fedllm.evaluation import METRICS

if TYPE_CHECKING:
    from fedllm.experiment.parts import Parts
    from fedllm.results import RunDir


class Course:
    """Follows a run (see `fedllm.experiment.run.Watch`) and shows nothing of it."""

    def __init__(self) -> None:
        self.doing = "starting"
        self.parts: Parts | None = None
        self.run: RunDir | None = None
        self.records: list[Mapping[str, Any]] = []
        """Those of earlier processes, too."""
        self.steps: dict[int, tuple[int, int]] = {}
        """Local steps done and to do, by client of the cohort that trains or has trained last."""
        self.losses: dict[int, float] = {}
        """Last known training loss of each client."""
        self.answers = 0
        """Generated in the present evaluation, over all its views."""
        self.began_s = time.monotonic()
        """When the first round of this process began; the record before it does not count."""
        self.rounds_here = 0
        self._is_between = True
        self._last_count = 0
        self.round_began_s = self.began_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def say(self, text: str) -> None:
        """Take note of what is being done."""
        self.doing = text

    def begin(self, parts: Parts, run: RunDir) -> None:
        """Take note of the parts, and of what earlier processes did."""
        self.parts, self.run = parts, run
        if parts.server.version:
            for record in run.read("metrics"):
                self._take(record)
        self.doing = "training" if self.records else "evaluating"
        self.began_s = self.round_began_s = time.monotonic()

    def step(self, cid: int, done: int, total: int) -> None:
        """Take note of a client's progress."""
        if self._is_between:
            assert self.parts is not None
            running = self.parts.loop.computation.running
            self.steps = {job.cid: (0, job.steps) for job in running}
            self._is_between, self.answers = False, 0
        self.steps[cid] = (done, total)
        is_done = all(did >= todo for did, todo in self.steps.values())
        self.doing = "evaluating" if is_done and self._is_evaluated_next() else "training"

    def answered(self, count: int) -> None:
        """Take note of generated answers; the count starts anew for each few views."""
        self.doing = "evaluating"
        self.answers += count - self._last_count if count > self._last_count else count
        self._last_count = count

    def record(self, record: Mapping[str, Any]) -> None:
        """Take note of a finished round."""
        self._take(record)
        self.round_began_s = time.monotonic()
        self.answers, self._last_count, self._is_between = 0, 0, True
        if record["round"]:
            self.rounds_here += 1
        else:
            self.began_s = self.round_began_s
        self.doing = "training" if self.round_number <= self.rounds else "drawing"

    @property
    def rounds(self) -> int:
        """Rounds that are planned."""
        return self.parts.config.federation.rounds if self.parts else 0

    @property
    def rounds_done(self) -> int:
        """The last round that was recorded."""
        return int(self.records[-1]["round"]) if self.records else 0

    @property
    def round_number(self) -> int:
        """The round that is under way."""
        return self.rounds_done + 1

    @property
    def progress(self) -> float:
        """Rounds done, with the part of the present one that is trained."""
        steps = [] if self._is_between else list(self.steps.values())
        todo, done = sum(total for _, total in steps), sum(did for did, _ in steps)
        return min(self.rounds_done + (0.9 * done / todo if todo else 0.0), self.rounds)

    @property
    def remaining_s(self) -> float | None:
        """Seconds to the end, by the pace of this process; None before there is one."""
        now, here = time.monotonic(), self.progress - (self.rounds_done - self.rounds_here)
        if here < 0.1:
            return None
        return (now - self.began_s) / here * (self.rounds - self.progress)

    @property
    def answers_due(self) -> int:
        """Answers that the present evaluation generates in all."""
        if self.parts is None:
            return 0
        rows, most = len(self.parts.dataset.test), self.parts.config.evaluation.max_rows
        is_last = bool(self.records) and self.round_number == self.rounds
        return (rows if is_last or most is None else min(rows, most)) * len(self.parts.scopes)

    @property
    def main_metric(self) -> str:
        """The metric the run is judged by."""
        return self.parts.evaluator.names[0] if self.parts else ""

    def main_values(self) -> list[tuple[int, float]]:
        """Return round and main metric of each evaluation: global, else the mean of personal."""
        found = []
        for record in self.records:
            evaluated = record.get("eval", {})
            view = evaluated.get("global") or evaluated.get("personal", {}).get("overall", {})
            value = view.get(self.main_metric)
            if value is not None and math.isfinite(value):
                found.append((record["round"], value))
        return found

    def best(self) -> tuple[int, float]:
        """Return round and value of the best evaluation, of which there must be one."""
        sign = 1 if METRICS[self.main_metric].is_higher_better else -1
        return max(self.main_values(), key=lambda point: sign * point[1])

    def train_losses(self) -> list[float]:
        """Return the mean training loss of each round."""
        losses = [record.get("train", {}).get("loss") for record in self.records]
        return [loss for loss in losses if loss is not None]

    def world_text(self) -> tuple[str, str]:
        """Return virtual time, and who does what at it; both empty where time stands still."""
        if self.parts is None or self.parts.config.mode == "prototype":
            return "", ""
        loop = self.parts.loop
        counts = loop.fleet.counts()
        told = [f"{count} {state}" for state, count in counts.items() if count]
        late = self.records[-1].get("staleness") if self.records else None
        if late and late["max"]:
            told.append(f"updates {late['mean']:.1f} versions late")
        return duration_text(loop.queue.now_s), ", ".join(told)

    def rejected(self) -> int:
        """Return how many updates the server has refused so far."""
        return sum(len(record.get("rejected", ())) for record in self.records)

    def _take(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)
        for client in record.get("train", {}).get("clients", ()):
            if client["loss"] is not None:
                self.losses[client["client"]] = client["loss"]

    def _is_evaluated_next(self) -> bool:
        assert self.parts is not None
        every = self.parts.config.evaluation.every
        number = self.round_number
        return number == self.rounds or bool(every and number % every == 0)
