"""What a trainer tells while it works: into the run directory, and to whoever watches."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from fedllm.central.checkpoints import MARK, Course, complete_checkpoints
from fedllm.central.parts import Parts
from fedllm.central.processes import barrier, gathered, shared
from fedllm.results import RunDir
from fedllm.results.history import is_better
from fedllm.results.storage import explained, write_text

logger = logging.getLogger(__name__)

BEST = "best.safetensors"
_LOGGED = {"loss": "loss", "learning_rate": "lr", "epoch": "epoch", "grad_norm": "grad_norm",
           "eval_loss": "eval_loss", "rewards/accuracies": "accuracy", "accuracy": "accuracy",
           "reward": "reward", "mean_token_accuracy": "token_accuracy"}  # fmt: skip


class CentralWatch(Protocol):
    """Told how a central run goes on; every method may do nothing."""

    def say(self, text: str) -> None:
        """Tell what is being done."""

    def ready(self) -> None:
        """Tell that everything is loaded."""

    def begin(self, parts: Parts, path: Path, steps: int) -> None:
        """Tell what is trained, in how many steps."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Tell a line of trainer_log.jsonl."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Tell the metrics of an evaluation."""


class Recorder(TrainerCallback):
    """Writes the records of a run and decides when to evaluate, to save and to stop.

    Args:
        parts: The run's parts.
        directory: Of the run; None in all processes but the first, which write nothing.
        path: The run directory.
        watch: Whom to tell.
    """

    def __init__(
        self, parts: Parts, directory: RunDir | None, path: Path, watch: CentralWatch
    ) -> None:
        self.parts, self.directory, self.path, self.watch = parts, directory, path, watch
        self.course = Course()
        self.trainer: Any = None
        """Set once it is made."""
        self.planned = 0
        """Evaluations that are planned."""
        self._began = time.perf_counter()
        self._log_began = self._began
        self.ended = ""

    # what the trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Plan, and evaluate the model as it is."""
        every = self.parts.config.evaluation.every
        if every == "epoch" and self.parts.stream is not None:
            self.planned = 1
        elif every == "epoch":
            self.planned = max(math.ceil(state.num_train_epochs - 1e-9), 1)
        else:
            self.planned = math.ceil(state.max_steps / int(every)) if every else 1
        self.watch.begin(self.parts, self.path, state.max_steps)
        config = self.parts.config
        logger.info(
            "stage %s, %s with %s: steps %d to %d, %d test rows",
            config.stage, config.model.path, config.adapter.method,
            state.global_step + 1, state.max_steps, len(self.parts.data.test),
        )  # fmt: skip
        if state.global_step == 0 and every:
            self._evaluate(state, is_last=False)
        self._began = self._log_began = time.perf_counter()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Write a line in LLaMA-Factory's format."""
        if not logs or "loss" not in logs:
            return
        done, total = state.global_step, state.max_steps
        took = time.perf_counter() - self._log_began
        left = took / max(done, 1) * (total - done)
        line = {
            "current_steps": done,
            "total_steps": total,
            "percentage": round(100 * done / max(total, 1), 2),
            "elapsed_time": str(timedelta(seconds=int(took))),
            "remaining_time": str(timedelta(seconds=int(left))),
            **{name: logs[key] for key, name in _LOGGED.items() if key in logs},
        }
        if self.directory is not None:
            self.directory.append("trainer_log", [line])
            self.watch.log(line)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate and save where a step is due."""
        self._after(state, control, is_epoch=False)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate and save where an epoch is due."""
        self._after(state, control, is_epoch=True)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint as complete, and delete old ones."""
        self.course.loss, self.course.rows = self._taken(self.trainer.peek())
        if self.directory is None:
            return
        folder = self.path / "checkpoints" / f"checkpoint-{state.global_step}"
        mark = {"course": vars(self.course), "lengths": self.directory.lengths()}
        with explained(folder, "Checkpoints before it are safe."):
            write_text(folder / MARK, json.dumps(mark, indent=2) + "\n")
        logger.info("saved %s", folder.name)
        old = complete_checkpoints(self.path)[: -self.parts.config.checkpoint.keep]
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)

    # decisions

    def _after(self, state: Any, control: Any, *, is_epoch: bool) -> None:
        config, step = self.parts.config, state.global_step
        is_end = step >= state.max_steps
        control.should_log = control.should_log or is_end

        def due(every: int | str) -> bool:
            if every == "epoch":
                return is_epoch
            return not is_epoch and bool(every) and step % int(every) == 0

        if due(config.evaluation.every) and not is_end:
            self._evaluate(state, is_last=False)
            if self._is_stale():
                control.should_training_stop = True
        if due(config.checkpoint.every) and not is_end:
            control.should_save = True

    def _is_stale(self) -> bool:
        """Tell whether training should end early; the first process decides."""
        patience = self.parts.config.evaluation.early_stopping_patience
        stale = patience is not None and self.course.since_best >= patience
        if shared(stale):
            self.ended = f"no better {self.parts.measure.main} in {patience} evaluations"
            logger.info("training ends early: %s", self.ended)
            return True
        return False

    def finish(self, state: Any) -> None:
        """Evaluate for the last time, on all test rows, with the weights that are kept."""
        self._evaluate(state, is_last=True)

    def load_best(self) -> bool:
        """Put the weights of the best evaluation back, if they are to be kept."""
        file = self.path / "checkpoints" / BEST
        if not self.parts.config.evaluation.best_model or not file.is_file():
            return False
        self.parts.tuned.load(load_file(file))
        return True

    # evaluation

    def _evaluate(self, state: Any, *, is_last: bool) -> None:
        measure, course = self.parts.measure, self.course
        train_s = time.perf_counter() - self._began
        loss, rows = self._taken(self.trainer.take())
        begin = time.perf_counter()
        metrics = measure.compared(self.trainer) if measure.compares else {}
        lines: list[dict[str, Any]] = []
        if self.directory is not None and (is_last or not measure.compares):
            answers, lines = measure.answers(sample=not is_last)
            metrics |= answers
        barrier()
        if self.directory is not None:
            number = 0 if state.global_step == 0 and not is_last else course.evaluations + 1
            course.evaluations = number
            self._record(state, metrics, lines, number, is_last)
            self._train_figures(state, metrics, loss, rows, number, train_s,
                                time.perf_counter() - begin)  # fmt: skip
            self._judge(metrics.get(measure.main), state.global_step, is_last)
        course.step = state.global_step
        self._began = time.perf_counter()

    def _taken(self, own: tuple[float, list[int]]) -> tuple[float, list[int]]:
        """Return the mean loss and the rows of all processes."""
        parts = gathered(own)
        rows = [row for _, more in parts for row in more]
        return sum(loss for loss, _ in parts) / len(parts), rows

    def _record(
        self,
        state: Any,
        metrics: Mapping[str, float],
        lines: list[dict[str, Any]],
        number: int,
        is_last: bool,
    ) -> None:
        assert self.directory is not None
        self._pending = {
            "round": number,
            "rounds_planned": number if is_last else max(self.planned, number + 1),
            "step": state.global_step,
            "epoch": round(float(state.epoch or 0.0), 6),
            "virtual_time_s": 0.0,
            "main_metric": self.parts.measure.main,
            "eval": {"global": {name: float(value) for name, value in metrics.items()}},
        }
        if is_last and self.ended:
            self._pending["ended"] = self.ended
        if is_last and lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            self.directory.write(f"predictions/{number}.jsonl", text)

    def _train_figures(
        self,
        state: Any,
        metrics: Mapping[str, float],
        loss: float,
        rows: list[int],
        number: int,
        train_s: float,
        evaluate_s: float,
    ) -> None:
        """Complete the record of an evaluation, and write it."""
        assert self.directory is not None
        record, steps = self._pending, state.global_step - self.course.step
        timing = {"round": number, "evaluate": evaluate_s, "wall_s": evaluate_s}
        if steps > 0:
            tokens = self.parts.tokens_in(rows)
            mean = loss / steps
            record["train"] = {
                "loss": mean,
                "tokens": tokens,
                "clients": [{"client": 0, "loss": mean, "steps": steps, "samples": len(rows)}],
            }
            timing |= {"train": train_s, "wall_s": evaluate_s + train_s,
                       "tokens_per_s": tokens / max(train_s, 1e-9)}  # fmt: skip
        self.directory.append("metrics", [record])
        self.directory.append("timing", [timing])
        told = "  ".join(f"{name} {value:.6g}" for name, value in metrics.items())
        logger.info("evaluation %d at step %d: %s", number, steps + self.course.step, told)
        self.watch.record(record)

    def _judge(self, value: float | None, step: int, is_last: bool) -> None:
        """Keep the weights of the best evaluation."""
        course = self.course
        if value is None or step == 0 or is_last or not math.isfinite(value):
            return
        if course.best is not None and not is_better(self.parts.measure.main, value, course.best):
            course.since_best += 1
            return
        course.best, course.best_step, course.since_best = value, step, 0
        if self.parts.config.evaluation.best_model:
            folder = self.path / "checkpoints"
            folder.mkdir(parents=True, exist_ok=True)
            trained = self.parts.tuned.trained()
            tensors = {name: t.detach().cpu().contiguous() for name, t in trained.items()}
            with explained(folder / BEST, "Checkpoints are safe."):
                save_file(tensors, folder / f".{BEST}")
                (folder / f".{BEST}").replace(folder / BEST)
