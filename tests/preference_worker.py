"""Rows with preferences and ratings for tests, made of questions; light, for worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fedllm.data import Dataset, TokenSet, load_dataset
from fedllm.experiment import parts
from fedllm.experiment.execution import Build

Sides = tuple[list[int], list[int]]


def rows_of(sequences: Sequence[Sides], desirable: Sequence[bool] | None = None) -> TokenSet:
    """Rows from (prompt, answer) token ids; the answer is supervised."""
    lengths = [len(prompt) + len(answer) for prompt, answer in sequences]
    flags = [np.arange(n) >= len(p) for n, (p, _) in zip(lengths, sequences, strict=True)]
    return TokenSet(
        tokens=np.array([t for p, a in sequences for t in [*p, *a]], np.int32),
        supervised=np.concatenate(flags),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=np.array([len(p) for p, _ in sequences], np.int32),
        labels=None,
        groups=None,
        references=("",) * len(sequences),
        desirable=None if desirable is None else np.array(desirable),
    )


def side(tokens: TokenSet, row: int) -> Sides:
    """The prompt and the answer of a row."""
    ids, cut = tokens.row(row)[0].tolist(), int(tokens.prompt_lengths[row])
    return ids[:cut], ids[cut:]


def judged(dataset: Dataset, task: Literal["preference", "rated"]) -> Dataset:
    """Make preferences of questions: an answer is better than as many times one token."""

    def with_worse(tokens: TokenSet) -> TokenSet:
        every = np.arange(len(tokens))
        worse = replace(tokens, tokens=np.where(tokens.supervised, 20, tokens.tokens))
        if task == "preference":
            return replace(tokens, rejected=worse)
        sides = [side(worse if row % 2 else tokens, row) for row in every.tolist()]
        return replace(rows_of(sides, (every % 2 == 0).tolist()), references=tokens.references)

    return replace(
        dataset, task=task, train=with_worse(dataset.train), test=with_worse(dataset.test)
    )


def judge(task: Literal["preference", "rated"]) -> Any:
    """Return what loads questions as preferences."""
    return lambda *args, **rest: judged(load_dataset(*args, **rest), task)


@dataclass(frozen=True)
class JudgingBuild(Build):
    """Lets worker processes load preferences."""

    def __call__(self, progress: Any, worker: int) -> Any:
        """Build with another loader: this process does nothing else."""
        parts.load_dataset = judge("preference")
        return super().__call__(progress, worker)
