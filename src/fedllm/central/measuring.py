"""A central model's metrics on the test rows, by the same code as a federation's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedllm.central.stages import METRICS_OF_PAIRS, STAGES
from fedllm.central.tuning import Tuned
from fedllm.config import CentralConfig
from fedllm.data import Dataset, TokenSet
from fedllm.errors import ConfigError
from fedllm.evaluation import BY_TASK, METRICS
from fedllm.evaluation.metrics import Evidence
from fedllm.seeding import rng

if TYPE_CHECKING:
    from fedllm.engine.forward import Forward
    from fedllm.federation import Scores

_TOKENS_PER_PASS = {"cpu": 2048, "cuda": 32768}


@dataclass
class Measure:
    """Evaluates one model on one test set.

    Args:
        config: The checked configuration.
        data: The data set.
        tuned: The model.
    """

    config: CentralConfig
    data: Dataset
    tuned: Tuned
    names: tuple[str, ...] = field(init=False)
    """Metrics of answers; the first is the main one where answers are not compared."""

    def __post_init__(self) -> None:
        chosen = self.config.evaluation.metrics
        if chosen == "auto":
            # how answers compare is measured by TRL besides
            task = self.data.task if self.data.task in BY_TASK and not self.compares else "chat"
            chosen = list(BY_TASK[task])
        wanted = [name for name in chosen if not (self.compares and name in METRICS_OF_PAIRS)]
        self.names = tuple(wanted) or ("loss",)
        present = {"tokens", "answers"}
        present |= {"classes"} if self.data.task == "classification" else set()
        unfit = [name for name in self.names if METRICS[name].needs not in present]
        if unfit:
            told = f"{', '.join(unfit)} needs {METRICS[unfit[0]].needs}"
            place = f"stage {self.config.stage} with the task {self.data.task}"
            raise ConfigError([f"evaluation.metrics: {told}, which {place} does not have"])

    @property
    def main(self) -> str:
        """The metric the run is judged by."""
        return METRICS_OF_PAIRS[0] if self.compares else self.names[0]

    @property
    def compares(self) -> bool:
        """Whether answers are compared, so that TRL evaluates."""
        return STAGES[self.config.stage].shape in ("pairs", "rated")

    def rows(self, *, sample: bool) -> np.ndarray:
        """Return the test rows that are evaluated, a sample of them on the way."""
        count, most = len(self.data.test), self.config.evaluation.max_rows
        if not sample or most is None or most >= count:
            return np.arange(count)
        return np.sort(rng(self.config.seed, "evaluation").choice(count, most, replace=False))

    def answers(self, *, sample: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return the metrics of answers on the test rows, and a line for each prediction."""
        if self.config.stage == "rm":
            return {}, []
        rows, test = self.rows(sample=sample), self.data.test
        with inference(self.tuned):
            evidence = self._evidence(rows)
        found = {name: METRICS[name].compute(evidence, rows) for name in self.names}
        lines = [
            {
                "row": row,
                "prompt": self.data.rows.test[row].subject,
                "reference": test.references[row],
                "prediction": evidence.answers[row],
                "is_right": bool(evidence.exact[row]),
                "view": "global",
                "client": 0,
            }
            for row in sorted(evidence.answers)
        ]
        return found, lines

    def compared(self, trainer: Any) -> dict[str, float]:
        """Return how well the better answers are told from the worse ones; all processes call."""
        found = trainer.evaluate()
        rewards = {
            key.removeprefix("eval_").removeprefix("rewards/"): v for key, v in found.items()
        }
        margin = rewards.get("margins", rewards.get("margin", math.nan))
        accuracy = rewards.get("accuracies", rewards.get("accuracy"))
        if accuracy is None:
            accuracy = _rated_accuracy(margin)
        return {
            "reward_accuracy": float(accuracy),
            "reward_margin": float(margin),
            "preference_loss": float(found["eval_loss"]),
        }

    def _evidence(self, rows: np.ndarray) -> Evidence:
        # not before: training need not wait for what only evaluation takes
        from fedllm.engine.forward import Forward
        from fedllm.engine.packing import split
        from fedllm.federation import Scores

        test, body = self.data.test, self.tuned.body
        forward = Forward(body, "causal-lm", None, int(self.tuned.loaded.tokenizer.pad_token_id))
        scores = Scores.empty(len(test))
        limit = _TOKENS_PER_PASS.get(body.device.type, 2048)
        owners = np.zeros(len(rows), np.int64)
        for part in split(test.lengths[rows], owners, limit, is_padded=not forward.is_packed):
            _score(forward, test, rows[part], scores)
        needs = {METRICS[name].needs for name in self.names}
        answers = self._generate(rows) if needs & {"answers", "classes"} else {}
        chosen = None
        if "classes" in needs:
            ids = {name.strip().lower(): i for i, name in enumerate(self.data.label_names)}
            chosen = np.full(len(test), -1)
            for row, answer in answers.items():
                chosen[row] = ids.get(answer.strip().lower(), -1)
        return Evidence(scores, test.references, answers, test.labels, chosen)

    def _generate(self, rows: np.ndarray) -> dict[int, str]:
        """Return the greedy answer to the prompt of each row."""
        test, tokenizer = self.data.test, self.tuned.loaded.tokenizer
        order = rows[np.argsort(test.prompt_lengths[rows], kind="stable")]
        size, answers = self.config.evaluation.batch_size, {}
        for start in range(0, len(order), size):
            part = order[start : start + size]
            ids, mask = _prompts(test, part, int(tokenizer.pad_token_id), self.tuned.body.device)
            written = self.tuned.body.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.config.evaluation.max_new_tokens,
                do_sample=False,
                eos_token_id=list(self.data.stop_ids),
                pad_token_id=int(tokenizer.pad_token_id),
                temperature=None,
                top_p=None,
                top_k=None,
            )[:, ids.shape[1] :].tolist()
            for row, own in zip(part.tolist(), written, strict=True):
                end = next((i for i, t in enumerate(own) if t in self.data.stop_ids), len(own))
                text = tokenizer.decode(own[:end], skip_special_tokens=True)
                answers[row] = str(text).strip()
        return answers


@contextmanager
def inference(tuned: Tuned) -> Iterator[None]:
    """Turn training off inside the block, with a cache of keys and values."""
    model, body = tuned.model, tuned.body
    was_training = model.training
    model.eval()
    checkpoints = tuned.config.training.gradient_checkpointing
    if checkpoints:
        body.gradient_checkpointing_disable()
    body.config.use_cache = True
    try:
        with torch.no_grad(), tuned.arithmetic():
            yield
    finally:
        body.config.use_cache = False
        if checkpoints:
            body.gradient_checkpointing_enable({"use_reentrant": False})
        model.train(was_training)


def _score(forward: Forward, tokens: TokenSet, rows: np.ndarray, scores: Scores) -> None:
    """Add the losses of some rows to the scores, changed in place."""
    from fedllm.engine.shards import collect

    found = forward.run(collect(tokens, rows, np.arange(len(rows))))
    owners = found.owners.cpu().numpy()
    assert found.correct is not None
    np.add.at(scores.loss_sum, rows[owners], found.losses.double().cpu().numpy())
    np.add.at(scores.correct, rows[owners], found.correct.cpu().numpy())
    np.add.at(scores.count, rows[owners], 1)


def _prompts(
    tokens: TokenSet, rows: np.ndarray, pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts padded on the left, int (n, longest), and their mask."""
    lengths = np.maximum(tokens.prompt_lengths[rows], 1)
    longest = int(lengths.max())
    ids = np.full((len(rows), longest), pad, np.int64)
    mask = np.zeros_like(ids)
    for i, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        ids[i, longest - length :] = tokens.row(row)[0][:length]
        mask[i, longest - length :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _rated_accuracy(margin: float) -> float:
    """Return 1 where wanted answers have the higher reward on average, 0 where they have not."""
    return math.nan if math.isnan(margin) else float(margin > 0)
