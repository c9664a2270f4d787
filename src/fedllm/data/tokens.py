"""Token ids of many rows in flat arrays: a row is a slice, a client is a set of row numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

import numpy as np
import numpy.typing as npt

Span = tuple[int, int]


@dataclass(frozen=True)
class TokenSet:
    """One split, tokenised; all arrays are shared by all clients and not to be modified."""

    tokens: npt.NDArray[np.int32]
    """Token ids of all rows, one after another, shape (total,)."""
    supervised: npt.NDArray[np.bool_]
    """Whether the loss counts the prediction of this token, shape (total,)."""
    offsets: npt.NDArray[np.int64]
    """Row i is `tokens[offsets[i]:offsets[i + 1]]`, shape (rows + 1,)."""
    prompt_lengths: npt.NDArray[np.int32]
    """Leading tokens that an answer is generated from, shape (rows,); 0 for plain text."""
    labels: npt.NDArray[np.int64] | None
    """Class ids, shape (rows,), if the task is classification."""
    groups: tuple[str, ...] | None
    """Label or category of each row, if rows have one."""
    references: tuple[str, ...]
    """The last answer of each row, whole; the label's name; '' for plain text."""
    rejected: TokenSet | None = None
    """For preference data: the worse answers. Row i has the prompt of row i here."""
    desirable: npt.NDArray[np.bool_] | None = None
    """For rated data (KTO): whether the answer of each row is wanted, shape (rows,)."""

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, shape (rows,)."""
        return np.diff(self.offsets)

    def row(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Return views of one row's tokens and of which of them are supervised."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[part], self.supervised[part]


def decoded(
    tokens: npt.NDArray[np.int32], learned: npt.NDArray[np.bool_], tokenizer: Any
) -> tuple[tuple[str, bool], ...]:
    """Return a row as text, stretch by stretch, and whether each is supervised."""
    runs = groupby(range(len(tokens)), key=lambda i: bool(learned[i]))
    return tuple((str(tokenizer.decode(tokens[list(run)].tolist())), is_it) for is_it, run in runs)


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row on its way into the flat arrays."""

    tokens: Sequence[int]
    learned: Sequence[Span]
    """First and one past the last token of each part that is supervised."""
    prompt_length: int
    row: int
    """Number of the row it was made from."""
    answer: int = 0
    """Which message is its last answer."""
    is_truncated: bool = False


@dataclass(frozen=True)
class Encoded:
    """What tokenising gives and the cache keeps; rows that were dropped are not in it."""

    tokens: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    prompt_lengths: npt.NDArray[np.int32]
    kept: npt.NDArray[np.int64]
    """Number of the row that each was made from."""
    answers: npt.NDArray[np.int64]
    """Which message of the conversation is the last answer of each."""
    truncated: npt.NDArray[np.bool_]
    """Whether each was shortened."""
    refused: npt.NDArray[np.int64]
    """Numbers of the rows that the chat template refused."""


def pack(rows: Sequence[TokenRow], refused: Sequence[int] = ()) -> Encoded:
    """Lay rows out one after another; `refused` are the numbers of those that are not."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row.tokens) for row in rows], out=offsets[1:])
    total = int(offsets[-1])
    tokens = np.fromiter(chain.from_iterable(row.tokens for row in rows), np.int32, total)
    supervised = np.zeros(total, np.bool_)
    for start, row in zip(offsets[:-1].tolist(), rows, strict=True):
        for first, end in row.learned:
            supervised[start + first : start + end] = True
    return Encoded(
        tokens=tokens,
        supervised=supervised,
        offsets=offsets,
        prompt_lengths=np.array([row.prompt_length for row in rows], np.int32),
        kept=np.array([row.row for row in rows], np.int64),
        answers=np.array([row.answer for row in rows], np.int64),
        truncated=np.array([row.is_truncated for row in rows], np.bool_),
        refused=np.array(refused, np.int64),
    )


def select(encoded: Encoded, rows: npt.NDArray[np.int64]) -> Encoded:
    """Return some of the rows, by their places in `encoded`, in that order."""
    if np.array_equal(rows, np.arange(len(encoded.kept))):
        return encoded
    starts, ends = encoded.offsets[rows], encoded.offsets[rows + 1]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(ends - starts)])
    places = np.concatenate(
        [np.zeros(0, np.int64), *(np.arange(a, b) for a, b in zip(starts, ends, strict=True))]
    )
    return replace(
        encoded,
        tokens=encoded.tokens[places],
        supervised=encoded.supervised[places],
        offsets=offsets,
        prompt_lengths=encoded.prompt_lengths[rows],
        kept=encoded.kept[rows],
        answers=encoded.answers[rows],
        truncated=encoded.truncated[rows],
    )
