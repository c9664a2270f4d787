"""What evaluation asks of an engine, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fedllm.adapters import Adapter, BaseDelta

if TYPE_CHECKING:
    from fedllm.data import TokenSet


@dataclass(frozen=True)
class View:
    """A model to evaluate, and the test rows to evaluate it on."""

    adapter: Adapter
    base: BaseDelta
    rows: np.ndarray
    """int (n,): rows of the test set."""
    mix: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Slot to the weight of its paths for each of these rows, float (n,)."""


@dataclass(frozen=True)
class AnswerScores:
    """How a model judges the answers of preference and rated data; zero where not asked for."""

    logps: np.ndarray
    """float64 (rows, sides): log-probability of each answer: of a pair, the better one first."""
    margins: np.ndarray
    """float64 (rows,): implicit reward of the better answer over the worse one; of a rated row its
    own reward, negative for an unwanted answer. The reward is beta times how much likelier the
    model makes an answer than the base does."""
    losses: np.ndarray
    """float64 (rows,): what training minimises."""

    @classmethod
    def empty(cls, rows: int, sides: int) -> AnswerScores:
        """Return scores of no rows yet."""
        return cls(np.zeros((rows, sides)), np.zeros(rows), np.zeros(rows))


@dataclass(frozen=True)
class Scores:
    """Teacher-forced results of each row of a test set; zero where a row was not asked for."""

    loss_sum: np.ndarray
    """float64 (rows,): summed cross-entropy in nats."""
    count: np.ndarray
    """int (rows,): predicted tokens, or 1 for a class."""
    correct: np.ndarray
    """int (rows,): how many of them were the most likely choice."""
    choice: np.ndarray
    """int (rows,): the class chosen (classification)."""
    preferences: AnswerScores | None = None
    """For preference and rated data."""

    @classmethod
    def empty(cls, rows: int) -> Scores:
        """Return scores of no rows yet."""
        counts, correct, choice = (np.zeros(rows, dtype=np.int64) for _ in range(3))
        return cls(np.zeros(rows), counts, correct, choice)


class Scorer(Protocol):
    """Scores test rows and generates answers."""

    def score(self, views: Sequence[View], tokens: TokenSet) -> Scores:
        """Return the loss and correctness of each asked-for row under its view."""

    def similarity(
        self,
        views: Sequence[View],
        cids: Sequence[int],
        tokens: TokenSet,
        *,
        references: int,
        seed: int,
    ) -> list[np.ndarray]:
        """Return how like each asked-for row is to its client's own training rows, in [-1, 1].

        It is the mean cosine similarity between last hidden states of the prompts, of the row and
        of `references` random training rows of the client, both under the view's adapter.
        """

    def generate(
        self,
        views: Sequence[View],
        tokens: TokenSet,
        *,
        max_new_tokens: int,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> dict[int, str]:
        """Return the greedy answer to the prompt of each asked-for row, by row."""
