"""What an example of training is made of: one sequence, or the two answers to one prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedllm.federation import Objective, trained_lengths

if TYPE_CHECKING:
    from fedllm.data import TokenSet


class Laid(NamedTuple):
    """The sequences of some examples in the order of a pass: by client, then by length."""

    chosen: np.ndarray
    """int (N,): which sequences."""
    owners: np.ndarray
    """int (N,): the client of each, non-decreasing."""
    examples: np.ndarray
    """int (N,): which of the examples each belongs to."""
    sides: np.ndarray
    """int (N,): 0, or 1 for the worse answer of a pair."""
    place: np.ndarray
    """int (sides, examples): where each sequence stands in the pass."""


@dataclass(frozen=True)
class Examples:
    """The rows of a token set as examples: of a pair both answers are in it."""

    tokens: TokenSet
    """All sequences: row i is example i, and row i + `rows` the worse answer of a pair."""
    rows: int
    lengths: np.ndarray
    """int (rows,): tokens of each example, both sides."""
    objective: Objective

    @classmethod
    def of(cls, tokens: TokenSet, objective: Objective) -> Examples:
        """Lay the sides of pairs one after the other; only last answers count as supervised.

        An earlier turn belongs to the prompt, and a preference says nothing about it.
        """
        lengths, rows = trained_lengths(tokens, objective), len(tokens)
        if objective != "sft":
            tokens = _answers(tokens)
        if objective == "dpo":
            assert tokens.rejected is not None
            tokens = _joined(tokens, _answers(tokens.rejected))
        return cls(tokens, rows, lengths, objective)

    @property
    def sides(self) -> int:
        """Sequences of an example."""
        return 2 if self.objective == "dpo" else 1

    def lay(self, rows: np.ndarray, owners: np.ndarray) -> Laid:
        """Return the order in which a pass goes over the sequences of these examples.

        Args:
            rows: int (n,): which examples.
            owners: int (n,): the client of each.
        """
        index = np.concatenate([rows + side * self.rows for side in range(self.sides)])
        owned = np.tile(owners, self.sides)
        lengths = self.tokens.offsets[index + 1] - self.tokens.offsets[index]
        order = np.lexsort((lengths, owned))
        place = np.argsort(order).reshape(self.sides, len(rows))
        examples, sides = order % len(rows), order // len(rows)
        return Laid(index[order], owned[order], examples, sides, place)

    def pass_sizes(self, rows: np.ndarray, *, is_padded: bool) -> np.ndarray:
        """Return what each example takes in a pass: its tokens, or the places of a padded pair."""
        if not is_padded or self.sides == 1:
            return np.asarray(self.lengths[rows])
        sides = [self.tokens.lengths[rows + side * self.rows] for side in range(self.sides)]
        return self.sides * np.asarray(np.max(sides, axis=0))


def _answers(tokens: TokenSet) -> TokenSet:
    """Return the rows with nothing supervised before the last answer."""
    place = np.arange(len(tokens.tokens)) - np.repeat(tokens.offsets[:-1], tokens.lengths)
    is_answer = place >= np.repeat(tokens.prompt_lengths, tokens.lengths)
    return replace(tokens, supervised=tokens.supervised & is_answer)


def _joined(first: TokenSet, second: TokenSet) -> TokenSet:
    """Return the rows of both, one set after the other."""
    return replace(
        first,
        tokens=np.concatenate([first.tokens, second.tokens]),
        supervised=np.concatenate([first.supervised, second.supervised]),
        offsets=np.concatenate([first.offsets, first.offsets[-1] + second.offsets[1:]]),
        prompt_lengths=np.concatenate([first.prompt_lengths, second.prompt_lengths]),
        references=(*first.references, *second.references),
        labels=None,
        groups=None,
        rejected=None,
    )


def mismatched(tokens: TokenSet, rows: np.ndarray, owners: np.ndarray) -> TokenSet:
    """Give each prompt the answer to the row before it, of the same client; the first the last's.

    With these KTO estimates how far the model has moved, as TRL does. None is longer than the
    longest row: what is beyond is cut off.

    Args:
        tokens: All rows.
        rows: int (n,): which of them.
        owners: int (n,): the client of each, non-decreasing.
    """
    donors = np.empty_like(rows)
    for owner in np.unique(owners):
        own = owners == owner
        donors[own] = np.roll(rows[own], 1)
    prompts = tokens.prompt_lengths[rows].astype(np.int64)
    answers = tokens.lengths[donors] - tokens.prompt_lengths[donors]
    longest = int(tokens.lengths.max())
    prompts = np.minimum(prompts, longest)
    sizes = np.stack([prompts, np.minimum(answers, longest - prompts)], axis=1).ravel()
    begins = np.stack(
        [tokens.offsets[rows], tokens.offsets[donors] + tokens.prompt_lengths[donors]]
    )
    index = np.repeat(begins.T.ravel() - (np.cumsum(sizes) - sizes), sizes)
    index += np.arange(int(sizes.sum()))
    is_answer = np.repeat(np.tile([False, True], len(rows)), sizes)
    return replace(
        tokens,
        tokens=tokens.tokens[index],
        supervised=tokens.supervised[index] & is_answer,
        offsets=np.concatenate([[0], np.cumsum(sizes.reshape(-1, 2).sum(axis=1))]),
        prompt_lengths=prompts.astype(np.int32),
        labels=None,
        groups=None,
        references=("",) * len(rows),
        desirable=None,
    )
